#!/usr/bin/env bash
# Checks the models of this folder: every design must hold in all of its states, every mutation must be caught.
# One argument, a regular expression, limits the run to the variants it matches.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
only=${1:-.}
memory=3500 # megabytes
depth=1000000

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
cd "$work"

bad=0
ran=0

# row model variant flags want: want is "holds", "counterexample" (a broken assertion) or "deadlock".
row() {
	local model=$1 variant=$2 flags=$3 want=$4 result states seconds start at
	[[ "$model $variant $flags" =~ $only ]] || return 0
	ran=$((ran + 1))
	start=$(date +%s%N)
	rm -f ./*
	local mode=(-DSAFETY -DCOLLAPSE "-DMEMLIM=$memory") run=("-m$depth")
	# Breadth first gives the shortest counterexample.
	[[ $want == counterexample ]] && mode+=(-DBFS) && run=()
	# The rotation model's processes wait for ever when all is done; only the other two can deadlock.
	[[ $model == rotation ]] && run+=(-E)
	# shellcheck disable=SC2086 # flags is a list
	if ! spin -a $flags "$here/$model.pml" >build.log 2>&1 || ! gcc -O2 -w "${mode[@]}" -o pan pan.c >>build.log 2>&1; then
		cat build.log >&2
		result="does not build"
	else
		nice ./pan "${run[@]}" >out 2>&1 || true
		at=$(sed -n 's/.*(at depth \([0-9]*\)).*/\1/p' out | head -n 1)
		if grep -q 'max search depth too small' out; then
			result="incomplete: depth"
		elif grep -q 'assertion violated' out; then
			result="counterexample, depth $at"
		elif grep -q '^pan:.*invalid end state' out; then
			result="deadlock, depth $at"
		elif grep -q 'Search not completed' out || ! grep -q 'errors: 0$' out; then
			result="incomplete: memory, or $(tail -n 1 out)"
		else
			result=holds
		fi
	fi
	states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' out 2>/dev/null | head -n 1)
	seconds=$((($(date +%s%N) - start) / 100000000))
	if [[ $result != "$want"* ]]; then
		result="$result  <- WRONG, expected: $want"
		bad=$((bad + 1))
	fi
	printf '%-10s %-74s %10s  %-26s %4d.%d\n' "$model" "$variant" "${states:--}" "$result" $((seconds / 10)) $((seconds % 10))
}

design() { row rotation "design: $1" "$2" holds; }
mutation() { row rotation "$1" "$1 ${2:-}" counterexample; }

printf '%-10s %-74s %10s  %-26s %6s\n' model variant states result s

design "overlap, 1 fail-over, 1 emergency, 4 materials" "-DFAILOVERS=1 -DEMERGENCIES=1 -DM=4"
design "overlap, 2 fail-overs, 1 emergency, 4 materials" "-DFAILOVERS=2 -DEMERGENCIES=1 -DM=4"
design "overlap, 1 fail-over, 1 drift, 1 emergency" "-DFAILOVERS=1 -DDRIFTS=1 -DEMERGENCIES=1"
design "overlap, 2 drifts, no fail-over" "-DFAILOVERS=0 -DDRIFTS=2"
design "overlap, 1 fail-over, 2 deletes, 4 materials" "-DFAILOVERS=1 -DDELETES=2 -DM=4"
design "overlap, one node, 2 fail-overs, 1 drift, 1 delete" "-DN=1 -DFAILOVERS=2 -DDRIFTS=1 -DDELETES=1"
design "overlap, 1 drift, 1 delete, 1 emergency, no fail-over" \
	"-DFAILOVERS=0 -DDRIFTS=1 -DDELETES=1 -DEMERGENCIES=1"
design "swap, 2 fail-overs, 1 emergency, 4 materials" "-DSWAP -DFAILOVERS=2 -DEMERGENCIES=1 -DM=4"
design "swap, 1 fail-over, 1 drift" "-DSWAP -DFAILOVERS=1 -DDRIFTS=1"
design "overlap, readers never see it turn round, writes repeated" \
	"-DSEEN -DREPEAT -DFAILOVERS=2 -DEMERGENCIES=1 -DDELETES=1"
design "overlap, readers never see it turn round, barrier write" \
	"-DSEEN -DBARRIER -DFAILOVERS=2 -DEMERGENCIES=1 -DDELETES=1"
design "swap, readers never see it turn round, writes repeated" "-DSEEN -DREPEAT -DSWAP -DFAILOVERS=2 -DEMERGENCIES=1"

mutation -DSEEN
mutation -DNOWAIT
mutation -DNOINTENT
mutation -DEAGERUNDO
mutation -DTRUSTPUT
mutation -DSTALE -DFAILOVERS=2
mutation -DREORDER
mutation -DDISCARD
mutation -DPRUNE
mutation -DPASTRETURN
mutation -DBAREREFUSE -DDRIFTS=1
mutation -DRECONCILEBLIND -DDRIFTS=1
mutation -DDELETEBUSY -DDELETES=1
mutation -DDROPTOMB -DDELETES=1
mutation -DTOMBOLD -DDELETES=2
mutation -DADOPTLAST -DDELETES=1
mutation "-DSWAP -DSWAPLATE"
mutation "-DSWAP -DSWAPBACK"
mutation "-DSWAP -DNOWAIT"

row consumers "design: reserve all at once, exclusively" "" holds
row consumers -DONEBYONE -DONEBYONE deadlock
row consumers -DNORESERVE -DNORESERVE counterexample
row joined "design: deliveries are shared, and who shared one that failed goes on alone" "" holds
row joined -DNOBARRIER -DNOBARRIER counterexample
row joined -DNOBACKBARRIER -DNOBACKBARRIER counterexample
row joined -DALLGUILTY -DALLGUILTY counterexample
row joined -DHOLDON -DHOLDON deadlock

if ((ran == 0)); then
	echo "no variant matches $only" >&2
	exit 1
fi
if ((bad)); then
	echo "$bad of $ran are not as expected" >&2
	exit 1
fi
echo "all $ran as expected"
