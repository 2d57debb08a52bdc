# The variables of ../setup.sh, with the same defaults: those of the runbook. Times
# are in seconds, as Vault reads them back. There is no secret among them.

variable "mount" {
  description = "Where the engine is."
  default     = "harmonyflow"
}

variable "kv_mount" {
  description = "KV version 2, which services read."
  default     = "secret"
}

variable "kv_prefix" {
  description = "Folder of the secrets there."
  default     = "harmonyflow"
}

variable "policy" {
  description = "Name of the policy of the engine's own token."
  default     = "harmonyflow-publish"
}

variable "engine_vault_addr" {
  description = "Vault, as the engine itself reaches it."
  default     = "https://vault.vault:8200"
}

variable "engine_vault_ca" {
  description = "Certificates that sign Vault's, PEM, where it is not one that the system trusts."
  default     = ""
}

variable "engine_token_period" {
  description = "A token that nobody renews lives this long: how long Vault may be down."
  default     = "768h"
}

variable "postgres_url" {
  description = "Where PostgreSQL is."
  default     = "postgresql://{{username}}:{{password}}@postgresql-primary.postgresql:5432/harmonyflow"
}

variable "postgres_ca" {
  description = "Certificates that sign PostgreSQL's, PEM."
  default     = ""
}

variable "postgres_admin" {
  description = "User of the engine there."
  default     = "vault"
}

variable "postgres_user" {
  description = "User under rotation."
  default     = "harmonyflow"
}

variable "redis_addresses" {
  description = "Where Redis is."
  type        = list(string)
  default     = ["redis-cluster.redis:6379"]
}

variable "redis_admin" {
  description = "User of the engine there."
  default     = "vault"
}

variable "redis_user" {
  description = "User under rotation; default is the one that requirepass protects."
  default     = "default"
}

variable "rabbitmq_urls" {
  description = "Where the management API of RabbitMQ is."
  type        = list(string)
  default     = ["https://rabbitmq-server.rabbitmq-production:15671"]
}

variable "rabbitmq_amqp_urls" {
  description = "Where RabbitMQ is; found by itself where this is empty."
  type        = list(string)
  default     = []
}

variable "rabbitmq_ca" {
  description = "Certificates that sign RabbitMQ's, PEM."
  default     = ""
}

variable "rabbitmq_admin" {
  description = "User of the engine there."
  default     = "vault"
}

variable "rabbitmq_user" {
  description = "User under rotation."
  default     = "harmonyflow"
}

variable "frequencies" {
  description = "The runbook's frequencies: when, and how long after that a rotation may still begin. Passwords are exchanged at one moment, in the night; the others overlap, and may begin late rather than not at all."
  type        = map(object({ cron = string, window = number }))
  default = {
    monthly   = { cron = "0 2 1 * *", window = 14400 }
    quarterly = { cron = "0 2 1 */3 *", window = 172800 }
    yearly    = { cron = "0 2 15 1 *", window = 604800 }
  }
}

variable "timezone" {
  description = "Time zone of those."
  default     = "UTC"
}

variable "propagation_delay" {
  description = "How long a change takes to reach every process: twice the hour in which External Secrets refreshes."
  default     = 7200
}

variable "jwt_access_ttl" {
  description = "Longest life of an access token."
  default     = 86400
}

variable "jwt_refresh_ttl" {
  description = "Longest life of a refresh token."
  default     = 2592000
}

variable "grace_period" {
  description = "Of the Redis password and the admin token."
  default     = 86400
}

variable "admin_field" {
  description = "Field of the admin token."
  default     = "token"
}

variable "encryption_field" {
  description = "Field of the encryption key."
  default     = "encryption-key"
}

variable "encryption_bits" {
  description = "Its size."
  default     = 256
}

variable "api_key" {
  description = "Whether the field api-key of session-state-service exists, which is rotated by hand."
  default     = false
}

variable "transit_key" {
  description = "A key of transit/, such as session-state, or none."
  default     = ""
}

variable "database_root" {
  description = "A database of database/, such as harmonyflow, or none."
  default     = ""
}

variable "overwrite" {
  description = "Roles that may replace a value that nobody gave, when they are created."
  type        = set(string)
  default     = []
}
