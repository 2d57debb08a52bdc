#!/usr/bin/env bash
# Prints the path of the Vault that a module pins, and no other: what is on PATH is
# not asked. It is built once.
# Usage: ensure-vault-at.sh MODULE, for example test/tools/vault
# Reads: XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"
# shellcheck source=scripts/lib/vault.sh
. "$root/scripts/lib/vault.sh"

vault_build vault "$root/${1:?which module?}" -tags minimal
