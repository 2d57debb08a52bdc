# Sourced by the ensure-*.sh scripts: builds a program once into the user's
# cache and prints its path. Every message goes to stderr, because stdout is
# the answer.

# cache_root prints the folder that holds everything these scripts keep.
cache_root() {
  if [ -z "${XDG_CACHE_HOME:-}" ] && [ -z "${HOME:-}" ]; then
    echo "neither XDG_CACHE_HOME nor HOME is set: set one, builds are kept below it" >&2
    return 1
  fi
  echo "${XDG_CACHE_HOME:-$HOME/.cache}/harmonyflow"
}

# cached_build LABEL DIR NAME COMMAND...
# prints DIR/NAME, after running COMMAND with $OUT set to the file to write
# unless it is there already. One build at a time for each DIR; the file
# appears by a rename, so that a build that was cut off leaves nothing.
cached_build() {
  local label=$1 dir=$2 name=$3
  shift 3
  if [ -x "$dir/$name" ]; then
    echo "$dir/$name"
    return
  fi
  if ! command -v go >/dev/null; then
    echo "go is missing: install Go $(cat "$(dirname "${BASH_SOURCE[0]}")/../../.go-version") from https://go.dev/dl to build $label" >&2
    return 1
  fi
  mkdir -p "$dir"
  (
    if command -v flock >/dev/null; then
      flock -n 9 || {
        echo "$label: waiting for another build of it" >&2
        flock 9
      }
    fi
    if [ ! -x "$dir/$name" ]; then
      build_with_progress "$label" "$dir" "$name" "$@"
    fi
  ) 9>"$dir/.lock" || return 1
  echo "$dir/$name"
}

build_with_progress() {
  local label=$1 dir=$2 name=$3 log start=$SECONDS status=0
  shift 3
  log=$dir/build.log
  echo "$label: building it once into $dir" >&2
  # 9 is the lock: a compiler that outlives an interrupted build must not hold it.
  OUT="$dir/.$name.$$" "$@" >"$log" 2>&1 </dev/null 9>&- &
  local pid=$!
  trap 'kill "$pid" 2>/dev/null; rm -f "$dir/.$name.$$"; exit 1' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1 9>&-
    if (((SECONDS - start) % 5 == 0)); then
      echo "$label: $((SECONDS - start)) s, $(grep -c '^go: downloading' "$log") modules fetched, $(grep -vc '^go: ' "$log") packages compiled" >&2
    fi
  done
  wait "$pid" || status=$?
  trap - INT TERM
  if [ "$status" != 0 ]; then
    rm -f "$dir/.$name.$$"
    echo "$label: the build failed after $((SECONDS - start)) s (exit $status). The end of $log:" >&2
    grep -v '^go: downloading' "$log" | tail -n 20 | sed 's/^/    /' >&2
    echo "$label: modules come from GOPROXY=$(go env GOPROXY); the build needs about 3 GB of disk and 2 GB of memory" >&2
    return 1
  fi
  mv -f "$dir/.$name.$$" "$dir/$name"
  echo "$label: built in $((SECONDS - start)) s" >&2
}
