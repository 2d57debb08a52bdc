#!/usr/bin/env bash
# Rotates the roles of a kind, or one of them, and shows progress until the new
# version is served and proven: rotate-secret.sh KIND [ROLE] [FLAGS]
# Exit status: see docs/reference/follower.md.
set -euo pipefail
if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: $0 KIND [ROLE] [FLAGS], for example: $0 redis" >&2
  exit 1
fi
exec harmonyflow rotate --follow "$@"
