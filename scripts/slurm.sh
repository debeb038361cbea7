#!/usr/bin/env bash
# Train on several machines with SLURM:   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh [key=value ...]
# Download first, on a node with a network, the data (python scripts/download.py) and the weights (into TORCH_HOME):
#   python -c 'from torchvision.models import get_model; get_model("resnet50", weights="IMAGENET1K_V2")'
# In a new job, resume=RUN_DIR resumes.
#
# SLURM sends SIGUSR1 two minutes before the time limit, and with PreemptParameters=send_user_signal before a preemption.
# The run then saves its state and requeues itself, and the next start resumes it in the same folder. After SIGTERM it
# saves its state, too, but SLURM has to requeue it (PreemptMode=REQUEUE).
#SBATCH --job-name=cifar10_tl
#SBATCH --ntasks-per-node=8          # one process per GPU
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=outputs/slurm-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f .venv/bin/activate ]] && source .venv/bin/activate

[[ " $*" == *" resume="* ]] || set -- trainer=ddp paths.output_dir="outputs/runs/slurm-${SLURM_JOB_ID}" \
    checkpoint_every_n_steps=200 "$@"
# --kill-on-bad-exit ends the job when one process is killed. srun has not inherited --cpus-per-task since Slurm 22.05.
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    python -m cifar10_tl.train trainer.num_nodes="${SLURM_JOB_NUM_NODES:-1}" \
    trainer.devices="${SLURM_NTASKS_PER_NODE:-1}" "$@"
