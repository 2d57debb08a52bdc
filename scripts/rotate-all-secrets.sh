#!/usr/bin/env bash
# Rotates everything, and shows progress until it is served and proven:
# rotate-all-secrets.sh [FLAGS], for example --reason="quarterly"
# Exit status: see docs/reference/follower.md.
set -euo pipefail
exec harmonyflow rotate --follow all "$@"
