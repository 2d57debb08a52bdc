#!/usr/bin/env bash
# Prints the path of a program that benchmarks need: `kv` is Vault's KV secrets engine as
# an external plugin, `plot` draws their figures. Each is built once.
# Reads: XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"

case ${1:-} in
kv | plot) ;;
*)
  echo "usage: $0 kv|plot" >&2
  exit 2
  ;;
esac

program_compile() {
  cd "$root/test/tools/$1"
  # GOFLAGS=-mod=readonly: whatever the caller has set, go.sum is the pin.
  CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='-mod=readonly -buildvcs=false' GOWORK=off \
    go build -v -trimpath -ldflags="-s -w" -o "$OUT" .
}

key=$(cd "$root/test/tools/$1" && cat go.mod go.sum ./*.go | git hash-object --stdin | cut -c1-12)
"$root/scripts/ensure-go.sh"
cached_build "$1" "$(cache_root)/$1-$key-$(go env GOOS)-$(go env GOARCH)" "$1" program_compile "$1"
