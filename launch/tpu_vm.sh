#!/usr/bin/env bash
# One run on a Cloud TPU slice of any size, through gcloud and queued resources.
#
#   launch/tpu_vm.sh [--dry-run] create            asks for the slice (SPOT=1: a preemptible one)
#   launch/tpu_vm.sh [--dry-run] status
#   launch/tpu_vm.sh [--dry-run] setup             installs this checkout on every host; mounts BUCKET, if set
#   launch/tpu_vm.sh [--dry-run] run COMMAND ...   runs the command on every host, e.g. python -m steerjax.train ...
#   launch/tpu_vm.sh [--dry-run] stop              SIGTERM to the run: training saves and stops
#   launch/tpu_vm.sh [--dry-run] delete
#
# Environment: TPU_NAME, ZONE, ACCELERATOR (v5litepod-16, v5p-256, v6e-16, ...), and where they are not the defaults
# PROJECT, RUNTIME and BUCKET (a Cloud Storage bucket, mounted at ~/bucket: the workdir must be seen by all hosts).
set -euo pipefail

dry_run=; [ "${1:-}" = --dry-run ] && { dry_run=1; shift; }
action=${1:-}; [ -n "$action" ] || { sed -n '4,9p' "$0" | cut -c3- >&2; exit 64; }
shift
: "${TPU_NAME:?set TPU_NAME}" "${ZONE:?set ZONE, e.g. us-east5-a}"
where=(--zone="$ZONE"); [ -n "${PROJECT:-}" ] && where+=(--project="$PROJECT")

runtime() {
    case ${ACCELERATOR:?set ACCELERATOR, e.g. v5p-256} in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) echo "set RUNTIME for $ACCELERATOR" >&2; exit 64 ;;
    esac
}
do_it() {
    if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
everywhere() {
    do_it gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all --command="$1"
}

case $action in
    create)
        RUNTIME=${RUNTIME:-$(runtime)}
        do_it gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${where[@]}" \
            --accelerator-type="${ACCELERATOR:?}" --runtime-version="$RUNTIME" ${SPOT:+--spot}
        ;;
    status) do_it gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" ;;
    setup)
        archive=$(mktemp); trap 'rm -f "$archive"' EXIT
        git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD
        do_it gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME":steerjax.tar.gz "${where[@]}" --worker=all
        everywhere "mkdir -p steerjax && tar -xzf steerjax.tar.gz -C steerjax && python3 -m venv .venv && \
.venv/bin/pip install --quiet -e 'steerjax[plots,tpu]'"
        if [ -n "${BUCKET:-}" ]; then
            everywhere "mkdir -p bucket && { mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket; }"
        fi
        ;;
    run)
        [ $# -gt 0 ] || { echo "run what?" >&2; exit 64; }
        everywhere "cd steerjax && PATH=\$HOME/.venv/bin:\$PATH PYTHONUNBUFFERED=1 exec $(printf '%q ' "$@")"
        ;;
    stop) everywhere "pkill -TERM -f 'python -m [s]teerjax'" ;;
    delete) do_it gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet ;;
    *) echo "no action $action" >&2; exit 64 ;;
esac
