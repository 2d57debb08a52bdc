# Puts the secrets of the HarmonyFlow platform under rotation, as ../setup.sh does, and
# keeps every setting of every connection and role as it stands here. README.md beside
# this file says how, and why no secret is in the state.

locals {
  # The runbook's table, and what it rotates beside it.
  runbook = {
    jwt-access = {
      kind = "jwt", every = "quarterly", secret = "session-state-service", field = "jwt-secret", connection = ""
      own  = { max_token_ttl = var.jwt_access_ttl, previous_field = "jwt-secret-previous" }
    }
    jwt-refresh = {
      kind = "jwt", every = "quarterly", secret = "session-state-service", field = "jwt-refresh-secret", connection = ""
      own  = { max_token_ttl = var.jwt_refresh_ttl, previous_field = "jwt-refresh-previous" }
    }
    postgresql = {
      kind = "postgresql", every = "monthly", secret = "postgresql", field = "password", connection = "postgresql"
      own  = { username = var.postgres_user }
    }
    redis = {
      kind = "redis", every = "monthly", secret = "redis", field = "password", connection = "redis"
      own  = { username = var.redis_user, grace_period = var.grace_period }
    }
    rabbitmq = {
      kind = "rabbitmq", every = "monthly", secret = "rabbitmq", field = "password", connection = "rabbitmq"
      own  = { username = var.rabbitmq_user }
    }
    admin-token = {
      kind = "api-key", every = "quarterly", secret = "admin", field = var.admin_field, connection = ""
      own  = { grace_period = var.grace_period, previous_field = "${var.admin_field}-previous" }
    }
    encryption-key = {
      kind = "encryption-key", every = "yearly", secret = "session-state-service", field = var.encryption_field, connection = ""
      own  = { length = var.encryption_bits, keys_field = "${var.encryption_field}s" }
    }
    api-key = {
      kind = "api-key", every = "by-hand", secret = "session-state-service", field = "api-key", connection = ""
      own  = { grace_period = var.grace_period, previous_field = "api-key-previous" }
    }
    session-state = {
      kind = "transit", every = "period", secret = "", field = "", connection = "vault"
      own  = { mount = "transit", key = var.transit_key }
    }
    database-root = {
      kind = "database-root", every = "period", secret = "", field = "", connection = "vault"
      own  = { mount = "database", key = var.database_root }
    }
  }
  here  = { api-key = var.api_key, session-state = var.transit_key != "", database-root = var.database_root != "" }
  table = { for name, r in local.runbook : name => r if lookup(local.here, name, true) }

  # Every setting of a role has a value, so that none can be changed elsewhere unseen.
  every_role = {
    description                = ""
    keep_versions              = 5
    consumers                  = []
    on_failure                 = "rollback"
    secret_hosts               = []
    auto_reconcile             = false
    apart_from                 = ""
    apart_by                   = 0
    jitter                     = 0
    disable_automated_rotation = false
  }
  shown = { allow_partial = false, document = "", username_field = "", previous_field = "" }
  user  = { usernames = [], password_policy = "", length = 32, close_connections = false }
  ring  = { strategy = "key-ring", propagation_delay = var.propagation_delay, next_field = "", keys_field = "" }
  of_kind = {
    postgresql     = merge(local.shown, local.user, { strategy = "swap", grace_period = 3600, valid_until = 0, allow_self_rotation = false })
    redis          = merge(local.shown, local.user, { strategy = "overlap" })
    rabbitmq       = merge(local.shown, local.user, { strategy = "swap", grace_period = 3600 })
    api-key        = merge(local.shown, { strategy = "overlap", encoding = "hex", length = 64, prefix = "", password_policy = "" })
    jwt            = merge(local.shown, local.ring, { algorithm = "HS256", length = 32, encoding = "base64", public_jwks = false })
    encryption-key = merge(local.shown, local.ring, { retire_after = 0, require_reencryption_ack = true })
    transit        = { min_decryption_version = 0 }
    database-root  = {}
  }
  when = merge(
    { for name, f in var.frequencies : name => {
      rotation_period = 0, rotation_schedule = f.cron, rotation_timezone = var.timezone, rotation_window = f.window
      missed_policy   = f.window > 0 ? "next" : "at_once"
    } },
    { for name, period in { period = 2764800, by-hand = 0 } : name => {
      rotation_period              = period, rotation_schedule = "", rotation_timezone = "", rotation_window = 0
      missed_policy                = period > 0 ? "at_once" : ""
    } },
  )
  roles = {
    for name, r in local.table : name => merge(
      local.every_role, local.of_kind[r.kind], local.when[r.every], r.own,
      { kind = r.kind, connection = r.connection },
      { for key, value in {
        field = r.field, publish_connection = "vault", publish_mount = var.kv_mount, publish_path = "${var.kv_prefix}/${r.secret}"
      } : key => value if r.secret != "" },
    )
  }

  # What the engine may publish to, and nothing beside it.
  places = toset([for r in local.runbook : r.secret if r.secret != ""])

  tls = { tls_server_name = "", tls_skip_verify = false }
  connections = {
    vault = merge(local.tls, {
      type                  = "vault", address = var.engine_vault_addr, tls_ca = var.engine_vault_ca
      namespace             = "", auth = "token", auth_mount = ""
      allowed_publish_paths = [for secret in local.places : "${var.kv_mount}/${var.kv_prefix}/${secret}"]
      allowed_roles         = keys(local.runbook)
    })
    postgresql = merge(local.tls, {
      type          = "postgresql", connection_url = var.postgres_url, username = var.postgres_admin, tls_ca = var.postgres_ca
      allowed_roles = ["postgresql"], allowed_usernames = [var.postgres_user]
    })
    redis = merge(local.tls, {
      type            = "redis", addresses = var.redis_addresses, username = var.redis_admin, tls_ca = "", tls = false
      topology        = "auto", persistence = "auto", allowed_cidrs = [], address_map = {}
      sentinel_master = "", sentinel_username = "", sentinel_auth_user = ""
      allowed_roles   = ["redis"], allowed_usernames = [var.redis_user]
    })
    rabbitmq = merge(local.tls, {
      type          = "rabbitmq", management_urls = var.rabbitmq_urls, amqp_urls = var.rabbitmq_amqp_urls, vhosts = [], address_map = {}
      username      = var.rabbitmq_admin, tls_ca = var.rabbitmq_ca
      allowed_roles = ["rabbitmq"], allowed_usernames = [var.rabbitmq_user]
    })
  }
  # What decides to whom a stored password is sent, so that it has to be given again.
  endpoint = ["address", "auth_mount", "connection_url", "addresses", "tls", "address_map", "management_urls", "amqp_urls", "tls_ca", "tls_server_name", "tls_skip_verify"]
}

resource "vault_policy" "publish" {
  name = var.policy
  policy = join("\n", concat(
    [for secret in local.places : "path \"${var.kv_mount}/data/${var.kv_prefix}/${secret}\" { capabilities = [\"create\", \"read\", \"update\"] }"],
    var.transit_key == "" ? [] : [
      "path \"transit/keys/${var.transit_key}\" { capabilities = [\"read\"] }",
      "path \"transit/keys/${var.transit_key}/rotate\" { capabilities = [\"update\"] }",
    ],
    var.database_root == "" ? [] : [
      "path \"database/config/${var.database_root}\" { capabilities = [\"read\"] }",
      "path \"database/rotate-root/${var.database_root}\" { capabilities = [\"update\"] }",
    ],
    [""],
  ))
}

# Secrets are given by create.sh, from the environment and from KV to the engine. The
# provider has no argument for them that it would not also keep in the state.
resource "terraform_data" "connection" {
  for_each         = local.connections
  triggers_replace = { for key, value in each.value : key => jsonencode(value) if contains(local.endpoint, key) }

  provisioner "local-exec" {
    command = "sh '${path.module}/create.sh' connection"
    environment = {
      MOUNT  = var.mount, NAME = each.key, BODY = jsonencode(each.value)
      POLICY = var.policy, ENGINE_TOKEN_PERIOD = var.engine_token_period
    }
  }
  depends_on = [vault_policy.publish]
}

resource "vault_generic_endpoint" "connection" {
  for_each             = local.connections
  path                 = "${var.mount}/connections/${each.key}"
  data_json            = jsonencode(each.value)
  ignore_absent_fields = true
  depends_on           = [terraform_data.connection]
}

# A new role is not told that it never rotates, or that its password never ends: the
# engine takes that for a mistake.
resource "terraform_data" "role" {
  for_each = local.roles

  provisioner "local-exec" {
    command = "sh '${path.module}/create.sh' role"
    environment = {
      MOUNT     = var.mount, NAME = each.key
      BODY      = jsonencode({ for key, value in each.value : key => value if !contains(["rotation_period", "valid_until"], key) || value != 0 })
      KV_MOUNT  = var.kv_mount, SECRET = lookup(each.value, "publish_path", ""), FIELD = lookup(each.value, "field", "")
      INITIAL   = lookup(each.value, "username", "") == "" ? "initial_value" : "initial_password"
      OVERWRITE = contains(var.overwrite, each.key) ? "yes" : ""
    }
  }
  depends_on = [vault_generic_endpoint.connection]
}

resource "vault_generic_endpoint" "role" {
  for_each             = local.roles
  path                 = "${var.mount}/roles/${each.key}"
  data_json            = jsonencode(each.value)
  ignore_absent_fields = true
  depends_on           = [terraform_data.role, vault_generic_endpoint.connection]
}
