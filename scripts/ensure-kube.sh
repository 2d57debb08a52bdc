#!/usr/bin/env bash
# Prints the path of the program that test/tools/kube holds: a Kubernetes control
# plane with KWOK for its nodes. It is built once. Beside it lies stages/, the
# part of KWOK's own configuration that test/kube starts from.
# Reads: XDG_CACHE_HOME.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/cached-build.sh
. "$root/scripts/lib/cached-build.sh"

kube_compile() {
  # GOFLAGS=-mod=readonly: whatever the caller has set, go.sum is the pin.
  export CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='-mod=readonly -buildvcs=false' GOWORK=off
  local version ldflags kwok
  cd "$root/test/tools/kube"
  version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
  # What a release has, and clients ask the API server for.
  local package=k8s.io/component-base/version
  ldflags="-s -w -X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=$(cut -d. -f2 <<<"$version")"
  go build -v -trimpath -ldflags="$ldflags" -o "$OUT" .
  kwok=$(go list -m -f '{{.Dir}}' sigs.k8s.io/kwok)/kustomize/stage
  mkdir "$OUT.d/stages"
  install -m 644 \
    "$kwok"/node/fast/node-initialize.yaml \
    "$kwok"/node/heartbeat-with-lease/node-heartbeat-with-lease.yaml \
    "$kwok"/pod/fast/{pod-ready,pod-complete,pod-delete}.yaml "$OUT.d/stages"
  rm -rf "$(dirname "$OUT")/stages"
  mv "$OUT.d/stages" "$(dirname "$OUT")/stages"
}

key=$(cd "$root/test/tools/kube" && cat go.mod go.sum ./*.go | git hash-object --stdin | cut -c1-12)
"$root/scripts/ensure-go.sh"
cached_build kube "$(cache_root)/kube-$key-$(go env GOOS)-$(go env GOARCH)" kube kube_compile
