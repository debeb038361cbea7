#!/usr/bin/env bash
# A run over several machines under SLURM:   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh [key=value ...]
#
# The global batch (data.batch_size) stays what it is; see docs/scaling.md for what to change with the number of GPUs.
# Two minutes before its time is up, or when the job has to make room for another, SLURM sends SIGUSR1: the run saves
# its state, and goes back into the queue; started again, it goes on in the same folder.
#
# Fetch the data first, where there is a network: python scripts/download.py
#SBATCH --job-name=cifar10_tl
#SBATCH --ntasks-per-node=8          # one process a GPU
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=outputs/slurm-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f .venv/bin/activate ]] && source .venv/bin/activate

# --kill-on-bad-exit: where one process is killed, the others would wait for it. --cpus-per-task: since Slurm 22.05 srun
# does not take it over from the lines above.
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    python -m cifar10_tl.train \
    trainer=ddp \
    trainer.num_nodes="${SLURM_JOB_NUM_NODES:-1}" \
    trainer.devices="${SLURM_NTASKS_PER_NODE:-1}" \
    paths.output_dir="outputs/runs/slurm-${SLURM_JOB_ID}" \
    checkpoint_every_n_steps=200 \
    "$@"
