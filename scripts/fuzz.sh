#!/usr/bin/env bash
# fuzz.sh TIME [TARGETS]: runs every fuzz target, or those whose names match TARGETS (a
# regular expression), for TIME each (30s, or 100000x), and prints what came of it. It
# fails where one crashes; the input that did it is then below testdata/fuzz.
# FUZZ_FILE keeps the figures, and those that stand in it already count in the total.
# FUZZFLAGS go to the test program (-test.parallel=1).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
time=${1:?usage: fuzz.sh TIME [TARGETS]} targets=${2:-.}
cd "$root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
figures=${FUZZ_FILE:-$scratch/figures}
touch "$figures"
read -r -a flags <<<"${FUZZFLAGS:-}"

# go test -list would build every test of the module to learn the same.
mapfile -t all < <(git grep -oE --untracked '^func Fuzz[A-Za-z0-9]+' -- '*_test.go' | sed -E 's#^(.*)/[^/]*:func #./\1 #; s#^[^/ ]*:func #. #' | sort -u)

# A package is built once for all of its targets. What is ours is instrumented and what
# we stand on is not: it is not ours to cover, and takes long to build.
module=$(go list -m)
cache=$(go env GOCACHE)/fuzz
crashed=0 built=""
for line in "${all[@]}"; do
  read -r package target <<<"$line"
  [[ $target =~ $targets || $package =~ $targets ]] || continue
  if [[ $package != "$built" ]]; then
    go test -c -gcflags="$module/...=-d=libfuzzer" -o "$scratch/test" "$package"
    built=$package
  fi
  echo "fuzzing $package $target" >&2
  ok=0
  (cd "$package" && exec "$scratch/test" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$time" \
    -test.fuzzcachedir "$cache/$module/${package#./}" "${flags[@]}") </dev/null >"$scratch/output" 2>&1 || ok=1
  # The last line that tells: fuzz: elapsed: 3s, execs: 110 (37/sec), new interesting: 3 (total: 5)
  said=$(grep -E 'execs: [0-9]+' "$scratch/output" | tail -n 1 || true)
  execs=$(sed -E 's/.*execs: ([0-9]+).*/\1/' <<<"${said:-execs: 0}")
  interesting=$(sed -nE 's/.*new interesting: ([0-9]+).*/\1/p' <<<"$said")
  [[ $ok = 0 ]] || { crashed=1 && cat "$scratch/output" >&2; }
  printf '%s %s %s %s %s\n' "$package" "$target" "${execs:-0}" "${interesting:-0}" "$ok" >>"$figures"
done

awk '
  BEGIN { printf "%-32s %-18s %12s %16s %8s\n", "package", "target", "executions", "new interesting", "crashes" }
  { key = $1 " " $2; if (!(key in execs)) order[++n] = key; execs[key] += $3; found[key] += $4; bad[key] += $5 }
  END {
    for (i = 1; i <= n; i++) {
      split(order[i], name, " "); key = order[i]
      printf "%-32s %-18s %12d %16d %8d\n", name[1], name[2], execs[key], found[key], bad[key]
      total += execs[key]; new += found[key]; crashes += bad[key]
    }
    printf "%-32s %-18s %12d %16d %8d\n", "total", n " targets", total, new, crashes
  }' "$figures"
exit "$crashed"
