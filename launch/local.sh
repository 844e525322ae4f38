#!/usr/bin/env bash
# N processes on this machine, joined into one run: to try a mesh of several hosts on a laptop.
#
#   launch/local.sh [--dry-run] N [DEVICES] -- python -m steerjax.train --config configs/rm.py --workdir DIR
#
# Each process has DEVICES virtual CPU devices (1). Lines of output begin with the process's number. When one process
# fails, all end; SIGTERM and Ctrl-C are passed on as SIGTERM (training then saves and stops), a second one kills.
# Exit status: of the first process that failed.
set -euo pipefail

usage() { sed -n '4p' "$0" | cut -c3- >&2; exit 64; }

dry_run=; [ "${1:-}" = --dry-run ] && { dry_run=1; shift; }
count=${1:-}; [[ $count =~ ^[1-9][0-9]*$ ]] || usage; shift
devices=1; [[ ${1:-} =~ ^[1-9][0-9]*$ ]] && { devices=$1; shift; }
[ "${1:-}" = -- ] && [ $# -gt 1 ] || usage
shift

GRACE=60  # seconds in which the others end by themselves, with a message that says why
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} STEERJAX_CPU_DEVICES=$devices
export STEERJAX_COORDINATOR=127.0.0.1:$port STEERJAX_PROCESSES=$count

pids=(); readers=()
signals=0
pass_on() {
    signals=$((signals + 1))
    if [ "$signals" -gt 1 ]; then signal=KILL; else signal=TERM; fi
    for pid in "${pids[@]}"; do kill -"$signal" "$pid" 2>/dev/null || true; done
}

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
trap pass_on TERM INT

for ((i = 0; i < count; i++)); do
    if [ -n "$dry_run" ]; then
        echo "STEERJAX_COORDINATOR=$STEERJAX_COORDINATOR STEERJAX_PROCESSES=$count STEERJAX_PROCESS=$i" \
            "STEERJAX_CPU_DEVICES=$devices JAX_PLATFORMS=$JAX_PLATFORMS $*"
        continue
    fi
    mkfifo "$pipes/$i"
    (trap '' TERM INT; while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$i" "$line"; done < "$pipes/$i") &
    readers+=($!)
    STEERJAX_PROCESS=$i "$@" > "$pipes/$i" 2>&1 &
    pids+=($!)
done

status=0; failed_at=
left=("${pids[@]}")
while [ "${#left[@]}" -gt 0 ]; do
    still=()
    for pid in "${left[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then still+=("$pid"); continue; fi
        code=0; wait "$pid" || code=$?
        if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
            status=$code; failed_at=$SECONDS
            for ((i = 0; i < count; i++)); do
                [ "${pids[$i]}" = "$pid" ] && echo "local.sh: process $i ended with status $code" >&2
            done
        fi
    done
    left=(${still[@]+"${still[@]}"})
    if [ -n "$failed_at" ] && [ "${#left[@]}" -gt 0 ] && [ $((SECONDS - failed_at)) -ge $GRACE ]; then
        echo "local.sh: ending those that are left" >&2
        signals=1; pass_on
    fi
    sleep 0.3 || true
done
wait ${readers[@]+"${readers[@]}"} || true
exit "$status"
