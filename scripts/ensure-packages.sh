#!/usr/bin/env bash
# ensure-packages.sh PKG[=FILE]...: makes sure that programs of Debian packages
# are there. A package is there when dpkg says so, when a command has its name,
# or when FILE exists. Says nothing then. Otherwise installs with apt when run
# as root, and names the packages when it cannot.
# Services of new packages are not started.
set -euo pipefail

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
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "missing: ${missing[*]} (Debian package names): install them with this system's package manager" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "missing: ${missing[*]}: install them with: sudo apt-get install -y ${missing[*]}" >&2
  exit 1
fi

log=$(mktemp)
policy=/usr/sbin/policy-rc.d
held=
restore() {
  if [ -n "$held" ]; then
    rm -f "$policy"
    if [ -e "$held/policy-rc.d" ]; then mv "$held/policy-rc.d" "$policy"; fi
    rmdir "$held"
  fi
  rm -f "$log"
}
trap restore EXIT
trap 'exit 1' INT TERM

# A server that apt starts would take the port and the memory of the private
# ones; 101 is "forbidden" to invoke-rc.d and systemd alike.
held=$(mktemp -d)
if [ -e "$policy" ] || [ -L "$policy" ]; then mv "$policy" "$held/policy-rc.d"; fi
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    -o DPkg::Lock::Timeout=300 "${missing[@]}" >>"$log" 2>&1 </dev/null
}

echo "installing ${missing[*]} with apt" >&2
if ! install; then
  # The package lists are missing or stale, as on a fresh image.
  if ! { apt-get update -q -o DPkg::Lock::Timeout=300 >>"$log" 2>&1 </dev/null && install; }; then
    echo "apt could not install ${missing[*]}. The end of its output:" >&2
    tail -n 15 "$log" | sed 's/^/    /' >&2
    exit 1
  fi
fi
