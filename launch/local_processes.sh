#!/usr/bin/env bash
# Runs N processes of one job on this machine, as a pod runs them on N: each has its own devices,
# they find each other over the network, and the first one writes.
#
#   bash launch/local_processes.sh N [--dry-run] --config=FILE.py --workdir=DIR [...]
#
# On CPUs the processes share the cores. With NVIDIA GPUs, process i gets GPU i. Ctrl-C and SIGTERM
# go to all. What process i says is in DIR.process_i.log; process 0 speaks here as well. Exits with
# the code of the process that failed by itself. PYTHON and PORT may be set.
set -euo pipefail

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] ||
    die "say how many processes, for example: bash launch/local_processes.sh 2 --config=..."
shift
dry_run=false
arguments=()
workdir=
for argument in "$@"; do
    case $argument in
    --dry-run) dry_run=true ;;
    --workdir=*) workdir=${argument#--workdir=} arguments+=("$argument") ;;
    *) arguments+=("$argument") ;;
    esac
done
[ -n "$workdir" ] || die "give --workdir=DIR, the same folder for all processes"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
$dry_run || [ -x "$python" ] ||
    die "$python is not there: run 'bash launch/environment.sh quickstart', or set PYTHON"
port=${PORT:-$((20000 + RANDOM % 10000))}

pids=()
# shellcheck disable=SC2329  # called by the traps
forward() {
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do kill -"$1" "$pid" 2>/dev/null || true; done
}

$dry_run || mkdir -p "$(dirname "$workdir")"
trap 'forward TERM' TERM
trap 'forward INT' INT
for ((i = 0; i < count; i++)); do
    command=("$python" -m ovseg_jax.main ${arguments[@]+"${arguments[@]}"}
        --processes="$count" --process_id="$i" --coordinator=localhost:"$port")
    log=$workdir.process_$i.log
    if $dry_run; then
        printf 'CUDA_VISIBLE_DEVICES=%s' "$i"
        printf ' %q' "${command[@]}"
        printf ' >%q 2>&1 &\n' "$log"
        continue
    fi
    # In the background a shell ignores Ctrl-C for a command; the trap above sends it on, and
    # Python takes it up again in any case.
    CUDA_VISIBLE_DEVICES=$i "${command[@]}" >"$log" 2>&1 &
    pids+=($!)
done
if $dry_run; then exit 0; fi

tail -n +1 -F --pid="${pids[0]}" "$workdir.process_0.log" 2>/dev/null &
follower=$!
code=0
for pid in "${pids[@]}"; do
    # A signal ends `wait` before the process has ended: ask again as long as it runs.
    while :; do
        status=0
        wait "$pid" || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    # When one fails, the others end with 128 or more, because they have lost it.
    if [ "$code" -eq 0 ] || { [ "$status" -gt 0 ] && [ "$status" -lt 128 ]; }; then code=$status; fi
done
wait "$follower" 2>/dev/null || true
exit "$code"
