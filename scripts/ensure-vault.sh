#!/usr/bin/env bash
# Prints the path of a usable vault: the one on PATH when it is new enough,
# otherwise a build of the version that test/tools/vault pins.
# Reads: VAULT_BUILD=1 (build even when there is one on PATH), XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"
oldest_major=1 oldest_minor=17

# new_enough VAULT: `vault version` says "Vault v1.21.2 (…), built …"; suffixes
# such as +ent or -rc1 do not matter.
new_enough() {
  local version major minor
  version=$("$1" version 2>/dev/null </dev/null | sed -n '1s/^Vault v\{0,1\}\([0-9]*\.[0-9]*\).*/\1/p') || return 1
  major=${version%%.*} minor=${version##*.}
  [ -n "$major" ] && { [ "$major" -gt "$oldest_major" ] ||
    { [ "$major" -eq "$oldest_major" ] && [ "$minor" -ge "$oldest_minor" ]; }; }
}

if [ -z "${VAULT_BUILD:-}" ] && found=$(command -v vault); then
  if new_enough "$found"; then
    echo "$found"
    exit
  fi
  echo "$found is older than $oldest_major.$oldest_minor (or does not run): building Vault instead" >&2
fi

tools=$root/test/tools/vault
version=$(sed -n 's/^require github.com\/hashicorp\/vault v\(.*\)/\1/p' "$tools/go.mod")
key=$(cat "$tools/go.mod" "$tools/go.sum" | git hash-object --stdin | cut -c1-12)
if command -v go >/dev/null; then
  platform=$(go env GOOS)-$(go env GOARCH)
else
  platform=$(uname -sm | tr 'A-Z ' 'a-z-')
fi

build_vault() {
  cd "$tools"
  # GOFLAGS=-mod=readonly: whatever the caller has set, go.sum is the pin.
  # CGO is off so that no C compiler is needed.
  CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='-mod=readonly -buildvcs=false' GOWORK=off \
    go build -v -tags minimal -ldflags="-s -w" -o "$OUT" github.com/hashicorp/vault
}

cache=$(cache_root)
cached_build "vault $version" "$cache/vault-$version-$key-$platform" vault build_vault
