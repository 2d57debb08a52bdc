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
# prints DIR/NAME, after running COMMAND with $OUT set to the file to write,
# and $OUT.d a folder for what else it needs, unless it is there already. One build at a time for each DIR; the file
# appears by a rename, so that a build that was cut off leaves nothing.
cached_build() {
  local label=$1 dir=$2 name=$3
  shift 3
  if [ -x "$dir/$name" ]; then
    echo "$dir/$name"
    return
  fi
  "$(dirname "${BASH_SOURCE[0]}")/../ensure-go.sh" || return 1
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
  local label=$1 dir=$2 name=$3 out log pid start=$SECONDS status=0
  shift 3
  log=$dir/build.log out=$dir/.$name.$$
  echo "$label: building it once into $dir" >&2
  mkdir -p "$out.d"
  # A process group of its own, so that stop_build reaches the compilers, too.
  # 9 is the lock: a compiler that outlives an interrupted build must not hold it.
  set -m
  OUT=$out GOTMPDIR=$out.d "$@" >"$log" 2>&1 </dev/null 9>&- &
  pid=$!
  set +m
  trap 'stop_build "$label" "$pid" "$out"' INT TERM HUP
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1 9>&-
    if orphaned; then
      stop_build "$label" "$pid" "$out"
    fi
    if (((SECONDS - start) % 5 == 0)); then
      echo "$label: $((SECONDS - start)) s, $(grep -c '^go: downloading' "$log") modules fetched, $(grep -vc '^go: ' "$log") packages compiled" >&2
    fi
  done
  wait "$pid" || status=$?
  trap - INT TERM HUP
  if [ "$status" != 0 ]; then
    rm -rf "$out" "$out.d"
    echo "$label: the build failed after $((SECONDS - start)) s (exit $status). The end of $log:" >&2
    grep -v '^go: downloading' "$log" | tail -n 20 | sed 's/^/    /' >&2
    echo "$label: modules come from GOPROXY=$(go env GOPROXY); the build needs about 3 GB of disk and 2 GB of memory" >&2
    return 1
  fi
  mv -f "$out" "$dir/$name"
  rm -rf "$out.d"
  echo "$label: built in $((SECONDS - start)) s" >&2
}

# stop_build LABEL PID OUT ends the process group PID and leaves nothing of it.
stop_build() {
  set +e
  trap '' INT TERM HUP
  kill -INT -- "-$2" 2>/dev/null
  for _ in {1..30}; do
    kill -0 -- "-$2" 2>/dev/null || break
    sleep 0.1 9>&-
  done
  kill -KILL -- "-$2" 2>/dev/null
  wait "$2" 2>/dev/null
  rm -rf "$3" "$3.d"
  echo "$1: the build was stopped" >&2
  exit 1
}

# orphaned says whether the script, or what called it, is gone: make ends only
# its own children when it is ended.
orphaned() {
  local parent
  kill -0 "$$" 2>/dev/null || return 0
  parent=$(ps -o ppid= -p "$$" 2>/dev/null) || return 1
  [ "${parent// /}" != "$PPID" ]
}
