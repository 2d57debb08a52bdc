#!/usr/bin/env bash
# Prints the path of a vault that has the database secrets engine: the one on
# PATH when it is new enough and was not built without it, otherwise a build of
# the version that test/tools/vault-full pins.
# Reads: VAULT_BUILD=1 (build even when there is one on PATH), XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"
# shellcheck source=scripts/lib/vault.sh
. "$root/scripts/lib/vault.sh"

# has_everything VAULT: a build with the tag "minimal" has no database engine.
has_everything() {
  ! go version -m "$1" 2>/dev/null | grep -q 'build[[:space:]]-tags=.*minimal'
}

if found=$(vault_from_path) && has_everything "$found"; then
  echo "$found"
else
  vault_build vault-full "$root/test/tools/vault-full"
fi
