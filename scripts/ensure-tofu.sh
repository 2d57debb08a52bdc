#!/usr/bin/env bash
# Prints the path of the OpenTofu that test/tools/tofu pins. It is built once. Beside
# it lies providers/, a mirror with the Vault provider that test/tools/tofu-vault pins.
# Reads: XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"

tofu_compile() {
  # GOFLAGS=-mod=readonly: whatever the caller has set, go.sum is the pin.
  export CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='-mod=readonly -buildvcs=false' GOWORK=off
  local provider=github.com/hashicorp/terraform-provider-vault version mirror
  # The provider's tag, v5, is no version that a Go module of this path could have.
  cd "$root/test/tools/tofu-vault"
  go mod download "$provider" || return 1
  version=$(cat "$(go list -m -f '{{.Dir}}' "$provider")/version/VERSION") || return 1
  mirror=$OUT.d/providers/registry.opentofu.org/hashicorp/vault/$version/$(go env GOOS)_$(go env GOARCH)
  mkdir -p "$mirror"
  go build -v -trimpath -ldflags="-s -w" -o "$mirror/terraform-provider-vault_v$version" "$provider" || return 1
  cd "$root/test/tools/tofu"
  go build -v -trimpath -ldflags="-s -w -X github.com/opentofu/opentofu/version.dev=no" -o "$OUT" github.com/opentofu/opentofu/cmd/tofu || return 1
  rm -rf "$(dirname "$OUT")/providers"
  mv "$OUT.d/providers" "$(dirname "$OUT")/providers"
}

key=$(cd "$root/test/tools" && cat tofu{,-vault}/{go.mod,go.sum,*.go} | git hash-object --stdin | cut -c1-12)
"$root/scripts/ensure-go.sh"
cached_build tofu "$(cache_root)/tofu-$key-$(go env GOOS)-$(go env GOARCH)" tofu tofu_compile
