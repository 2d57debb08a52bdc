#!/usr/bin/env bash
# ensure-packages.sh PKG[=FILE]...: makes sure that programs of Debian packages
# are there. A package is there when dpkg says so, when a command has its name,
# or when FILE exists. Says nothing then. Otherwise installs with apt when run
# as root, and names the packages when it cannot.
# Services of new packages are not started.
set -euo pipefail

missing=()
find_missing() {
  local package name file
  missing=()
  for package in "$@"; do
    name=${package%%=*}
    file=${package#"$name"}
    file=${file#=}
    if command -v "$name" >/dev/null || { [ -n "$file" ] && [ -e "$file" ]; }; then
      continue
    fi
    if command -v dpkg-query >/dev/null &&
      [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ]; then
      continue
    fi
    missing+=("$name")
  done
}

# A server that apt starts would take the port and the memory of the private
# ones; 101 is "forbidden" to invoke-rc.d and systemd alike. What was there
# before lies beside it meanwhile, and comes back even after a SIGKILL: with
# the next run.
policy=/usr/sbin/policy-rc.d saved=/usr/sbin/policy-rc.d.before-harmonyflow
marker='# by ensure-packages.sh of harmonyflow, while it installs'
is_ours() { [ -f "$policy" ] && grep -qxF "$marker" "$policy"; }

forbid_starts() {
  allow_starts
  if [ -e "$policy" ] || [ -L "$policy" ]; then cp -a "$policy" "$saved"; fi
  printf '#!/bin/sh\n%s\nexit 101\n' "$marker" >"$policy.new"
  chmod 755 "$policy.new"
  mv -f "$policy.new" "$policy"
}

allow_starts() {
  if ! is_ours; then
    rm -f "$saved" # a copy of what is there, or of what somebody replaced
  elif [ -e "$saved" ] || [ -L "$saved" ]; then
    mv -f "$saved" "$policy"
  else
    rm -f "$policy"
  fi
  rm -f "$policy.new"
}

# One run at a time. What apt starts must not hold the lock: 9>&- below.
lock() { exec 9>/run/harmonyflow-packages.lock && flock "$@" 9; }

if [ "$(id -u)" = 0 ] && is_ours && lock -n; then
  allow_starts # of a run that was killed
  exec 9>&-
fi

find_missing "$@"
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "missing: ${missing[*]} (Debian package names): install them with this system's package manager" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "missing: ${missing[*]}: install them with: sudo apt-get install -y ${missing[*]}" >&2
  exit 1
fi

lock -n || {
  echo "waiting for another installation" >&2
  lock
}
find_missing "$@" # the other one may have brought them
[ ${#missing[@]} -gt 0 ] || exit 0

log=$(mktemp)
restore() {
  allow_starts
  rm -f "$log"
}
trap restore EXIT
trap 'exit 1' INT TERM HUP
forbid_starts

install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    -o DPkg::Lock::Timeout=300 "${missing[@]}" >>"$log" 2>&1 </dev/null 9>&-
}

echo "installing ${missing[*]} with apt" >&2
if ! install; then
  # The package lists are missing or stale, as on a fresh image.
  if ! { apt-get update -q -o DPkg::Lock::Timeout=300 >>"$log" 2>&1 </dev/null 9>&- && install; }; then
    echo "apt could not install ${missing[*]}. The end of its output:" >&2
    tail -n 15 "$log" | sed 's/^/    /' >&2
    exit 1
  fi
fi
