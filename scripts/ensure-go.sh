#!/usr/bin/env bash
# ensure-go.sh: says in one sentence what keeps the Go on PATH from building
# this, and fails; says nothing otherwise.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
need=$(sed -n 's/^go \([0-9]*\.[0-9]*\).*/\1/p' "$root/go.mod")
fetches=1.21 # the first that reads a newer go.mod, and fetches what it asks for

if ! found=$(command -v go); then
  echo "go is missing: install Go $need, or any from $fetches on, which fetches $need itself, from https://go.dev/dl" >&2
  exit 1
fi

# at_least HAVE WANTED, both MAJOR.MINOR
at_least() {
  [ "${1%%.*}" -gt "${2%%.*}" ] || { [ "${1%%.*}" -eq "${2%%.*}" ] && [ "${1##*.}" -ge "${2##*.}" ]; }
}

# Away from the repository, whose go.mod an old Go cannot read.
version=$(cd / && GOTOOLCHAIN=local GOWORK=off go env GOVERSION 2>/dev/null) || version=unknown
have=$(sed -n 's/^.*go\([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' <<<"$version")
if [ -z "$have" ]; then
  echo "$found does not say which Go it is (go env GOVERSION: $version): install Go $need from https://go.dev/dl" >&2
  exit 1
fi
if at_least "$have" "$need"; then
  exit 0
fi
if ! at_least "$have" "$fetches"; then
  echo "$found is Go ${version#go}, which cannot read this go.mod: install Go $need, or any from $fetches on, which fetches $need itself, from https://go.dev/dl" >&2
  exit 1
fi
toolchain=$(cd / && go env GOTOOLCHAIN 2>/dev/null) || toolchain=
if [ "$toolchain" = local ]; then
  echo "$found is Go ${version#go} and must not fetch Go $need (GOTOOLCHAIN=local): set GOTOOLCHAIN=auto, or install Go $need from https://go.dev/dl" >&2
  exit 1
fi
if ! why=$(cd "$root" && go env GOVERSION 2>&1 >/dev/null); then
  echo "$found is Go ${version#go} and could not fetch Go $need (GOTOOLCHAIN=$toolchain): $(tail -n 1 <<<"$why"); install Go $need from https://go.dev/dl" >&2
  exit 1
fi
