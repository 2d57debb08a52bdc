#!/usr/bin/env bash
# Prints the path of the External Secrets controller that test/tools/eso pins.
# It is built once. Beside it lies crds/, the definitions of its kinds.
# Reads: XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"

eso_compile() {
  # GOFLAGS=-mod=readonly: whatever the caller has set, go.sum is the pin.
  export CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='-mod=readonly -buildvcs=false' GOWORK=off
  local module=github.com/external-secrets/external-secrets from
  cd "$root/test/tools/eso"
  go build -v -trimpath -ldflags="-s -w" -o "$OUT" "$module"
  from=$(go list -m -f '{{.Dir}}' "$module")/config/crds/bases
  mkdir "$OUT.d/crds"
  install -m 644 "$from"/*.yaml "$OUT.d/crds"
  rm -rf "$(dirname "$OUT")/crds"
  mv "$OUT.d/crds" "$(dirname "$OUT")/crds"
}

key=$(cd "$root/test/tools/eso" && cat go.mod go.sum ./*.go | git hash-object --stdin | cut -c1-12)
"$root/scripts/ensure-go.sh"
cached_build external-secrets "$(cache_root)/eso-$key-$(go env GOOS)-$(go env GOARCH)" external-secrets eso_compile
