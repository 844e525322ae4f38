#!/usr/bin/env bash
#SBATCH --job-name=steerjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1       # or 8, one a GPU: both work
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --signal=TERM@120         # before the time limit: training saves and stops
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# One run over the GPUs of several nodes. The workdir and the data lie on a file system that all nodes share.
#
#   sbatch [--nodes=N ...] launch/slurm.sh python -m steerjax.train --config configs/rm.py --config.batch.rows=16 \
#       --workdir DIR
#   launch/slurm.sh --dry-run COMMAND ...      prints what would be run
#
# steerjax finds the other tasks through the variables that srun sets; srun ends all tasks when one fails.
set -euo pipefail

run=(srun --kill-on-bad-exit=1 --label)
if [ "${1:-}" = --dry-run ]; then run=(echo "${run[@]}"); shift; fi
if [ $# -eq 0 ]; then sed -n '14,16p' "$0" | cut -c3- >&2; exit 64; fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONUNBUFFERED=1
exec "${run[@]}" "$@"
