#!/usr/bin/env bash
# Checks the models of this folder: every design must hold in all of its states, every mutation must be caught, and
# together they must take every row of the code's transition tables.
# The seconds it prints are the processor's, those of compiling included.
# One argument, a regular expression, limits the run to the variants it matches. JOBS is how many run at once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
only=${1:-.}
jobs=${JOBS:-2}
memory=3500 # megabytes, each
depth=2000000

missing=()
command -v spin >/dev/null || missing+=(spin)
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
if ((${#missing[@]})); then
	if ((EUID == 0)) && command -v apt-get >/dev/null; then
		echo "installing ${missing[*]}" >&2
		{ apt-get install -y "${missing[@]}" || { apt-get update && apt-get install -y "${missing[@]}"; }; } >/dev/null
	else
		echo "check.sh: the Debian packages spin and gcc are needed; install them with: apt-get install ${missing[*]}" >&2
		exit 1
	fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What broken(n) in a model stands for.
declare -A properties=(
	[1]="nothing is lost" [2]="what is served works" [3]="overlap is real" [4]="nobody is shut out"
	[5]="what consumers use works" [6]="an end leaves nothing half done" [7]="compromised stays out" [8]="a direction never turns"
	[10]="a key is known wherever it counts" [11]="a key leaves when it no longer counts" [12]="one new version a rotation"
	[13]="an end says what happened" [20]="a unit goes together" [21]="one restarts a consumer at a time" [22]="back for its own fault only"
	[23]="pods run with what is served" [24]="one restart"
)

# check one row: number model variant flags want. want is "holds", "broken" (a property), "deadlock" or "never ends".
check() {
	local n=$1 model=$2 variant=$3 flags=$4 want=$5 result property=all states reached seconds at
	local dir=$work/$n
	mkdir "$dir" && cd "$dir"
	local mode=(-DSAFETY) run=("-m$depth") cover=-DNOCOVER
	case $want in
	broken | deadlock) ;;
	*) cover=-DCOVER ;;
	esac
	[[ $want == broken ]] && mode+=(-DBFS) && run=() # breadth first gives the shortest counterexample
	if [[ $flags == *-DLIVE* ]]; then
		mode=() run=("-m$depth" -a -f)
		property="every rotation ends"
	elif [[ $model == rotation || $model == ring || $model == kept ]]; then
		run+=(-E) # their processes wait for ever when all is done
	fi
	# shellcheck disable=SC2086 # flags is a list
	if ! spin -a $cover $flags "$here/$model.pml" >build.log 2>&1 ||
		! gcc -O1 -w "${mode[@]}" -DCOLLAPSE "-DMEMLIM=$memory" "-I$here" -o pan pan.c >>build.log 2>&1; then
		cat build.log >&2
		result="does not build"
	else
		nice ./pan "${run[@]}" >out 2>&1 || true
		at=$(sed -n 's/.*(at depth \([0-9]*\)).*/\1/p' out | head -n 1)
		if grep -q 'max search depth too small' out; then
			result="incomplete: depth"
		elif grep -q 'acceptance cycle' out; then
			result="never ends"
		elif grep -q 'assertion violated' out; then
			result=broken
			property=$(sed -n 's/.*assertion violated (\([0-9]*\)!=\1).*/\1/p' out | head -n 1)
			[[ -n $property ]] && property="$property ${properties[$property]:-?}" || property=$(sed -n 's/.*assertion violated \(.*\) (at.*/\1/p' out | head -n 1)
		elif grep -q '^pan:.*invalid end state' out; then
			result=deadlock property="no deadlock"
		elif grep -q 'Search not completed' out || ! grep -q 'errors: 0$' out; then
			result="incomplete: memory, or $(tail -n 1 out)"
		else
			result=holds
		fi
	fi
	states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' out 2>/dev/null | head -n 1)
	reached=$(sed -n 's/.*depth reached \([0-9]*\).*/\1/p' out 2>/dev/null | head -n 1)
	times >times.log
	seconds=$(awk 'NR == 2 {for (i = 1; i <= 2; i++) {split($i, t, /[ms]/); s += 60 * t[1] + t[2]}; printf "%.1f", s}' times.log)
	[[ $want == holds ]] && sed -n 's/^row //p' out 2>/dev/null >"$work/rows.$n"
	if [[ $result != "$want"* ]]; then
		result="$result  <- WRONG, expected: $want"
		touch "$work/bad.$n"
	fi
	printf '%-9s %-66s %-38s %-11s %9s %7s %6s\n' "$model" "$variant" "$property" "$result" "${states:--}" "${at:-${reached:--}}" "$seconds"
	cd "$work" && rm -rf "$dir"
}

ran=0
row() {
	[[ "$1 $2 $3" =~ $only ]] || return 0
	ran=$((ran + 1))
	while (($(jobs -rp | wc -l) >= jobs)); do wait -n || true; done
	check "$ran" "$@" &
}
design() { row "$1" "$2" "$3" holds; }
mutation() { row "$1" "$2" "$2 ${3:-}" "${4:-broken}"; }

printf '%-9s %-66s %-38s %-11s %9s %7s %6s\n' model "variant or mutation" property result states depth s
# shellcheck source=docs/model/variants.sh
source "$here/variants.sh"
wait

if ((ran == 0)); then
	echo "no variant matches $only" >&2
	exit 1
fi
if [[ $only == . ]]; then
	cat "$work"/rows.* | sort -un >"$work/taken"
	sed -n 's/^#define row_\(.*\) \([0-9]*\)$/\2 \1/p' "$here/transitions.h" >"$work/all"
	never=$(awk 'NR == FNR {taken[$1]; next} !($1 in taken) {print "  " $2}' "$work/taken" "$work/all")
	echo "$(wc -l <"$work/taken") of $(wc -l <"$work/all") rows of the transition tables are taken"
	if [[ -n $never ]]; then
		printf 'never taken:\n%s\n' "$never" >&2
		touch "$work/bad.rows"
	fi
fi
bad=$(find "$work" -name 'bad.*' | wc -l)
if ((bad)); then
	echo "$bad of $ran are not as expected" >&2
	exit 1
fi
echo "all $ran as expected"
