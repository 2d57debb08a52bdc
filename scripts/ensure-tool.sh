#!/usr/bin/env bash
# ensure-tool.sh PACKAGE VERSION: prints the path of a Go program, built from
# the module proxy at exactly that version with the Go that is installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"
package=${1:?usage: ensure-tool.sh PACKAGE VERSION} version=${2:?usage: ensure-tool.sh PACKAGE VERSION}
name=$(basename "$package")

install_tool() {
  local bin=$OUT.d/bin
  mkdir "$bin"
  # Not below the repository, so that its go.mod has no say.
  cd "$bin"
  GOBIN=$bin CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='' GOWORK=off go install -v "$package@$version"
  mv "$bin/$name" "$OUT"
}

"$root/scripts/ensure-go.sh"
cache=$(cache_root)
# A linter reads only what its own Go understands: another Go is another build.
cached_build "$name $version" "$cache/$name-$version-$(go env GOVERSION)" "$name" install_tool
