#!/usr/bin/env bash
# Prints the path of a usable vault: the one on PATH when it is new enough,
# otherwise a build of the version that test/tools/vault pins.
# Reads: VAULT_BUILD=1 (build even when there is one on PATH), XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"
# shellcheck source=scripts/lib/vault.sh
. "$root/scripts/lib/vault.sh"

vault_from_path || vault_build vault "$root/test/tools/vault" -tags minimal
