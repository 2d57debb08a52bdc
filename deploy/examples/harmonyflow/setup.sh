#!/bin/sh
# Puts the secrets of the HarmonyFlow platform under rotation, where they stand
# today: below secret/harmonyflow/, in the fields that services read. What stands
# there is adopted, so nothing changes for anybody; what is missing is generated.
#
# It may be run again at any time: what is there already is left as it is. It says
# what it does, and stops at the first thing that Vault refuses. README.md beside
# it says what to have ready, what to look at afterwards and how to undo it.
#
# Set first (vault login, or VAULT_ADDR and VAULT_TOKEN), and then:
#
#   POSTGRES_ADMIN_PASSWORD   of the users with which the engine changes passwords.
#   REDIS_ADMIN_PASSWORD      Each is needed until its connection is there.
#   RABBITMQ_ADMIN_PASSWORD
#
# Everything below has a default.
set -eu

# Where things are in Vault.
MOUNT=${MOUNT:-harmonyflow}       # the engine
KV_MOUNT=${KV_MOUNT:-secret}      # KV version 2, which services read
KV_PREFIX=${KV_PREFIX:-harmonyflow}
POLICY=${POLICY:-harmonyflow-publish}
# Vault, as the engine itself reaches it. For https:// with an authority of your
# own ENGINE_VAULT_CA is the file of its certificate.
ENGINE_VAULT_ADDR=${ENGINE_VAULT_ADDR:-${VAULT_ADDR:-https://vault.vault:8200}}
ENGINE_VAULT_CA=${ENGINE_VAULT_CA:-${VAULT_CACERT:-}}
# A token that nobody renews lives this long: how long Vault may be down.
ENGINE_TOKEN_PERIOD=${ENGINE_TOKEN_PERIOD:-768h}

# PostgreSQL. Certificates are checked; POSTGRES_CA is a file.
POSTGRES_URL=${POSTGRES_URL:-'postgresql://{{username}}:{{password}}@postgresql-primary.postgresql:5432/harmonyflow'}
POSTGRES_CA=${POSTGRES_CA:-}
POSTGRES_ADMIN=${POSTGRES_ADMIN:-vault}
POSTGRES_USER=${POSTGRES_USER:-harmonyflow}

# Redis. The user "default" is the one that requirepass protects.
REDIS_ADDRESSES=${REDIS_ADDRESSES:-redis-cluster.redis:6379}
REDIS_ADMIN=${REDIS_ADMIN:-vault}
REDIS_USER=${REDIS_USER:-default}

# RabbitMQ. AMQP addresses are found by themselves where this is empty.
RABBITMQ_URLS=${RABBITMQ_URLS:-https://rabbitmq-server.rabbitmq-production:15671}
RABBITMQ_AMQP_URLS=${RABBITMQ_AMQP_URLS:-}
RABBITMQ_CA=${RABBITMQ_CA:-}
RABBITMQ_ADMIN=${RABBITMQ_ADMIN:-vault}
RABBITMQ_USER=${RABBITMQ_USER:-harmonyflow}

# When. Passwords are exchanged at one moment, which has to be in the night: their
# window is short. The others overlap, and may begin late rather than not at all.
MONTHLY=${MONTHLY:-0 2 1 * *}
QUARTERLY=${QUARTERLY:-0 2 1 */3 *}
YEARLY=${YEARLY:-0 2 15 1 *}
MONTHLY_WINDOW=${MONTHLY_WINDOW:-4h}
QUARTERLY_WINDOW=${QUARTERLY_WINDOW:-48h}
YEARLY_WINDOW=${YEARLY_WINDOW:-168h}
TIMEZONE=${TIMEZONE:-UTC}

# How long a change takes to reach every process (External Secrets refresh each
# hour), and how long tokens live. Too long costs nothing; too short ends sessions.
PROPAGATION_DELAY=${PROPAGATION_DELAY:-2h}
JWT_ACCESS_TTL=${JWT_ACCESS_TTL:-24h}
JWT_REFRESH_TTL=${JWT_REFRESH_TTL:-720h}
GRACE_PERIOD=${GRACE_PERIOD:-24h} # of the Redis password and the admin token

ADMIN_FIELD=${ADMIN_FIELD:-token}
ENCRYPTION_FIELD=${ENCRYPTION_FIELD:-encryption-key}
ENCRYPTION_BITS=${ENCRYPTION_BITS:-256}

# Only where they exist: a key of transit/, a database of database/, and the field
# api-key of session-state-service. TRANSIT_KEY=session-state,
# DATABASE_ROOT=harmonyflow, API_KEY=yes.
TRANSIT_KEY=${TRANSIT_KEY:-}
DATABASE_ROOT=${DATABASE_ROOT:-}
API_KEY=${API_KEY:-}

# Roles, with spaces between them, that may replace a value that nobody gave.
OVERWRITE=${OVERWRITE:-}

# The secrets that the engine fills.
SECRETS="session-state-service postgresql redis rabbitmq admin"

die() {
    echo "$*" >&2
    exit 1
}

# exists PATH: whether Vault has it. Any answer but yes and no ends the script.
exists() {
    if said=$(vault read "$1" 2>&1 >/dev/null); then
        echo "$1: is there already"
        return 0
    fi
    case $said in
    *"No value found"*) return 1 ;;
    esac
    die "$said"
}

# stands SECRET FIELD: whether services find something there today.
stands() {
    if said=$(vault kv get -mount="$KV_MOUNT" -field="$2" "$KV_PREFIX/$1" 2>&1); then
        [ -n "$said" ]
        return
    fi
    case $said in
    *"No value found"* | *"No data found"* | *"not present in secret"*) return 1 ;;
    esac
    die "$said"
}

# connection NAME ADMIN-PASSWORD FIELD=VALUE…
connection() {
    name=$1 password=$2
    shift 2
    if exists "$MOUNT/connections/$name"; then
        return
    fi
    [ -n "$password" ] || die "the password of $name's admin user is missing; the top of $0 says how to set it"
    echo "$MOUNT/connections/$name: connecting"
    printf %s "$password" | vault write "$MOUNT/connections/$name" type="$name" password=- "$@"
}

# role NAME FREQUENCY SECRET FIELD INITIAL FIELD=VALUE…: what stands goes from one
# vault to the other, and over no command line.
role() {
    name=$1 frequency=$2 secret=$3 field=$4 initial=$5
    shift 5
    if exists "$MOUNT/roles/$name"; then
        return
    fi
    case $frequency in
    monthly) set -- "$@" rotation_schedule="$MONTHLY" rotation_window="$MONTHLY_WINDOW" rotation_timezone="$TIMEZONE" ;;
    quarterly) set -- "$@" rotation_schedule="$QUARTERLY" rotation_window="$QUARTERLY_WINDOW" rotation_timezone="$TIMEZONE" ;;
    yearly) set -- "$@" rotation_schedule="$YEARLY" rotation_window="$YEARLY_WINDOW" rotation_timezone="$TIMEZONE" ;;
    by-hand) ;;
    esac
    case " $OVERWRITE " in
    *" $name "*) set -- "$@" overwrite_existing=true ;;
    esac
    set -- "$MOUNT/roles/$name" "$@" field="$field" \
        publish_connection=vault publish_mount="$KV_MOUNT" publish_path="$KV_PREFIX/$secret"
    if stands "$secret" "$field"; then
        echo "$MOUNT/roles/$name: adopting $field of $KV_MOUNT/$KV_PREFIX/$secret"
        vault kv get -mount="$KV_MOUNT" -field="$field" "$KV_PREFIX/$secret" | vault write "$@" "$initial=-"
    else
        echo "$MOUNT/roles/$name: generating $field of $KV_MOUNT/$KV_PREFIX/$secret"
        vault write "$@"
    fi
}

# kept NAME FIELD=VALUE…: a role whose secret Vault itself keeps.
kept() {
    name=$1
    shift
    if ! exists "$MOUNT/roles/$name"; then
        vault write "$MOUNT/roles/$name" connection=vault "$@"
    fi
}

# What the engine may do in Vault: these secrets, and nothing beside them.
policy() {
    for secret in $SECRETS; do
        echo "path \"$KV_MOUNT/data/$KV_PREFIX/$secret\" { capabilities = [\"create\", \"read\", \"update\"] }"
    done
    if [ -n "$TRANSIT_KEY" ]; then
        echo "path \"transit/keys/$TRANSIT_KEY\" { capabilities = [\"read\"] }"
        echo "path \"transit/keys/$TRANSIT_KEY/rotate\" { capabilities = [\"update\"] }"
    fi
    if [ -n "$DATABASE_ROOT" ]; then
        echo "path \"database/config/$DATABASE_ROOT\" { capabilities = [\"read\"] }"
        echo "path \"database/rotate-root/$DATABASE_ROOT\" { capabilities = [\"update\"] }"
    fi
}

# self is how the engine reaches the Vault that it runs in: with a token of its own,
# which it renews. It is made only where there is a use for it.
self() {
    if exists "$MOUNT/connections/vault"; then
        return
    fi
    paths=
    for secret in $SECRETS; do
        paths="$paths,$KV_MOUNT/$KV_PREFIX/$secret"
    done
    set -- type=vault address="$ENGINE_VAULT_ADDR" ${ENGINE_VAULT_CA:+tls_ca=@"$ENGINE_VAULT_CA"} \
        allowed_publish_paths="${paths#,}" \
        allowed_roles=jwt-access,jwt-refresh,encryption-key,api-key,admin-token,postgresql,redis,rabbitmq,session-state,database-root
    echo "$MOUNT/connections/vault: connecting"
    token=$(vault token create -orphan -period="$ENGINE_TOKEN_PERIOD" -policy="$POLICY" -display-name=harmonyflow -field=token)
    if ! printf %s "$token" | vault write "$MOUNT/connections/vault" auth=token token=- "$@"; then
        VAULT_TOKEN=$token vault token revoke -self
        exit 1
    fi
}

exists "$MOUNT/config" >/dev/null || die "$MOUNT/ is not the engine: mount it with vault secrets enable -path=$MOUNT vault-plugin-secrets-harmonyflow"

policy | vault policy write "$POLICY" -
self

connection postgresql "${POSTGRES_ADMIN_PASSWORD:-}" \
    connection_url="$POSTGRES_URL" username="$POSTGRES_ADMIN" ${POSTGRES_CA:+tls_ca=@"$POSTGRES_CA"} \
    allowed_roles=postgresql allowed_usernames="$POSTGRES_USER"
connection redis "${REDIS_ADMIN_PASSWORD:-}" \
    addresses="$REDIS_ADDRESSES" username="$REDIS_ADMIN" \
    allowed_roles=redis allowed_usernames="$REDIS_USER"
connection rabbitmq "${RABBITMQ_ADMIN_PASSWORD:-}" \
    management_urls="$RABBITMQ_URLS" amqp_urls="$RABBITMQ_AMQP_URLS" username="$RABBITMQ_ADMIN" ${RABBITMQ_CA:+tls_ca=@"$RABBITMQ_CA"} \
    allowed_roles=rabbitmq allowed_usernames="$RABBITMQ_USER"

# The seven secrets of the runbook, each where it was and as often as it was.
role jwt-access quarterly session-state-service jwt-secret initial_value \
    kind=jwt max_token_ttl="$JWT_ACCESS_TTL" propagation_delay="$PROPAGATION_DELAY" previous_field=jwt-secret-previous
role jwt-refresh quarterly session-state-service jwt-refresh-secret initial_value \
    kind=jwt max_token_ttl="$JWT_REFRESH_TTL" propagation_delay="$PROPAGATION_DELAY" previous_field=jwt-refresh-previous
role postgresql monthly postgresql password initial_password \
    kind=postgresql connection=postgresql username="$POSTGRES_USER"
role redis monthly redis password initial_password \
    kind=redis connection=redis username="$REDIS_USER" grace_period="$GRACE_PERIOD"
role rabbitmq monthly rabbitmq password initial_password \
    kind=rabbitmq connection=rabbitmq username="$RABBITMQ_USER"
role admin-token quarterly admin "$ADMIN_FIELD" initial_value \
    kind=api-key encoding=hex length=64 grace_period="$GRACE_PERIOD" previous_field="$ADMIN_FIELD-previous"
role encryption-key yearly session-state-service "$ENCRYPTION_FIELD" initial_value \
    kind=encryption-key length="$ENCRYPTION_BITS" propagation_delay="$PROPAGATION_DELAY" \
    keys_field="${ENCRYPTION_FIELD}s" require_reencryption_ack=true

# What the runbook rotates beside them. The API key has no frequency there.
if [ -n "$API_KEY" ]; then
    role api-key by-hand session-state-service api-key initial_value \
        kind=api-key encoding=hex length=64 grace_period="$GRACE_PERIOD" previous_field=api-key-previous
fi
if [ -n "$TRANSIT_KEY" ]; then
    kept session-state kind=transit mount=transit key="$TRANSIT_KEY" rotation_period=768h
fi
if [ -n "$DATABASE_ROOT" ]; then
    kept database-root kind=database-root mount=database key="$DATABASE_ROOT" rotation_period=768h
fi

vault read "$MOUNT/status"
