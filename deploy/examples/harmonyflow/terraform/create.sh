#!/bin/sh
# Brings a connection or a role about, with the secret that belongs to it: main.tf runs
# it once for each. Secrets go through pipes, over no command line and into no file.
#
#   create.sh connection   MOUNT NAME BODY, POLICY ENGINE_TOKEN_PERIOD
#   create.sh role         MOUNT NAME BODY, KV_MOUNT SECRET FIELD INITIAL OVERWRITE
#
# Those are variables of the environment; BODY is JSON. The password of a connection is in
# POSTGRES_ADMIN_PASSWORD, REDIS_ADMIN_PASSWORD or RABBITMQ_ADMIN_PASSWORD.
set -eu

die() {
    echo "$*" >&2
    exit 1
}

# exists PATH: whether Vault has it. Any answer but yes and no ends the script.
exists() {
    if said=$(vault read "$1" 2>&1 >/dev/null); then
        return 0
    fi
    case $said in
    *"No value found"*) return 1 ;;
    esac
    die "$said"
}

# stands: whether services find something there today.
stands() {
    if said=$(vault kv get -mount="$KV_MOUNT" -field="$FIELD" "$SECRET" 2>&1); then
        [ -n "$said" ]
        return
    fi
    case $said in
    *"No value found"* | *"No data found"* | *"not present in secret"*) return 1 ;;
    esac
    die "$said"
}

# connect FIELD: writes a connection with the secret that it reads.
connect() {
    vault write "$MOUNT/connections/$NAME" @"$body" "$1=-"
}

connection() {
    # One that is there needs its secret only where that is sent elsewhere from now on.
    if exists "$MOUNT/connections/$NAME"; then
        if said=$(vault write "$MOUNT/connections/$NAME" @"$body" 2>&1); then
            return
        fi
        case $said in
        *"in the same request"*) ;;
        *) die "$said" ;;
        esac
    fi
    case $NAME in
    postgresql) variable=POSTGRES_ADMIN_PASSWORD password=${POSTGRES_ADMIN_PASSWORD:-} ;;
    redis) variable=REDIS_ADMIN_PASSWORD password=${REDIS_ADMIN_PASSWORD:-} ;;
    rabbitmq) variable=RABBITMQ_ADMIN_PASSWORD password=${RABBITMQ_ADMIN_PASSWORD:-} ;;
    vault)
        # A token of the engine's own, which it renews.
        token=$(vault token create -orphan -period="$ENGINE_TOKEN_PERIOD" -policy="$POLICY" -display-name=harmonyflow -field=token)
        if ! printf %s "$token" | connect token; then
            VAULT_TOKEN=$token vault token revoke -self
            exit 1
        fi
        return
        ;;
    *) die "$NAME is no connection of the runbook" ;;
    esac
    [ -n "$password" ] || die "$MOUNT/connections/$NAME needs the password of its admin user; set $variable"
    printf %s "$password" | connect password
}

role() {
    if exists "$MOUNT/roles/$NAME"; then
        return
    fi
    set -- "$MOUNT/roles/$NAME" @"$body"
    if [ -n "$OVERWRITE" ]; then
        set -- "$@" overwrite_existing=true
    fi
    if [ -n "$SECRET" ] && stands; then
        echo "$MOUNT/roles/$NAME: adopting $FIELD of $KV_MOUNT/$SECRET"
        vault kv get -mount="$KV_MOUNT" -field="$FIELD" "$SECRET" | vault write "$@" "$INITIAL=-"
    else
        echo "$MOUNT/roles/$NAME: generating"
        vault write "$@"
    fi
}

# What is no secret; vault reads JSON from files alone.
body=$(mktemp)
trap 'rm -f "$body"' EXIT
printf %s "$BODY" >"$body"

"$1"
