#!/usr/bin/env bash
# Prints the path of the program that test/tools/operators holds: what External
# Secrets and Vault Secrets Operator read a Vault with. It is built once.
# Reads: XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"

operators_compile() {
  cd "$root/test/tools/operators"
  # GOFLAGS=-mod=readonly: whatever the caller has set, go.sum is the pin.
  CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='-mod=readonly -buildvcs=false' GOWORK=off \
    go build -v -trimpath -ldflags="-s -w" -o "$OUT" .
}

key=$(cd "$root/test/tools/operators" && cat go.mod go.sum ./*.go | git hash-object --stdin | cut -c1-12)
"$root/scripts/ensure-go.sh"
cached_build operators "$(cache_root)/operators-$key-$(go env GOOS)-$(go env GOARCH)" operators operators_compile
