#!/usr/bin/env bash
# Rotates everything, and shows progress until it is served and proven:
# rotate-all-secrets.sh [FLAGS], for example --reason="quarterly"
# After a compromise, every earlier version is refused at once:
# rotate-all-secrets.sh emergency --reason="laptop stolen" [FLAGS]
# Exit status: see docs/reference/follower.md.
set -euo pipefail
if [[ ${1-} == emergency ]]; then
  shift
  exec harmonyflow emergency --follow all "$@"
fi
exec harmonyflow rotate --follow all "$@"
