# Sourced by the ensure-vault*.sh scripts, after cached-build.sh.

vault_oldest_major=1 vault_oldest_minor=17

# vault_new_enough VAULT: `vault version` says "Vault v1.21.2 (…), built …";
# suffixes such as +ent or -rc1 do not matter.
vault_new_enough() {
  local version major minor
  version=$("$1" version 2>/dev/null </dev/null | sed -n '1s/^Vault v\{0,1\}\([0-9]*\.[0-9]*\).*/\1/p') || return 1
  major=${version%%.*} minor=${version##*.}
  [ -n "$major" ] && { [ "$major" -gt "$vault_oldest_major" ] ||
    { [ "$major" -eq "$vault_oldest_major" ] && [ "$minor" -ge "$vault_oldest_minor" ]; }; }
}

# vault_from_path prints the vault on PATH if it is new enough, and nothing when
# VAULT_BUILD is set.
vault_from_path() {
  local found
  [ -z "${VAULT_BUILD:-}" ] && found=$(command -v vault) || return 1
  if vault_new_enough "$found"; then
    echo "$found"
    return
  fi
  echo "$found is older than $vault_oldest_major.$vault_oldest_minor (or does not run): building Vault instead" >&2
  return 1
}

# vault_build NAME MODULE FLAG...: builds what the module at MODULE pins, once,
# and prints its path.
vault_build() {
  local name=$1 module=$2 version key platform cache
  shift 2
  version=$(sed -n 's/^require github.com\/hashicorp\/vault v\(.*\)/\1/p' "$module/go.mod")
  key=$(cat "$module/go.mod" "$module/go.sum" | git hash-object --stdin | cut -c1-12)
  if command -v go >/dev/null; then
    platform=$(go env GOOS)-$(go env GOARCH)
  else
    platform=$(uname -sm | tr 'A-Z ' 'a-z-')
  fi
  cache=$(cache_root)
  cached_build "$name $version" "$cache/$name-$version-$key-$platform" vault vault_compile "$module" "$@"
}

# vault_compile MODULE FLAG...
vault_compile() {
  cd "$1"
  shift
  # GOFLAGS=-mod=readonly: whatever the caller has set, go.sum is the pin.
  # CGO is off so that no C compiler is needed.
  CGO_ENABLED=0 GOOS='' GOARCH='' GOFLAGS='-mod=readonly -buildvcs=false' GOWORK=off \
    go build -v "$@" -ldflags="-s -w" -o "$OUT" github.com/hashicorp/vault
}
