#!/usr/bin/env bash
# Train on one node, one process for each GPU, from the project's folder:
#   sbatch scripts/slurm/single_node.sh -c configs/mnist.yaml --run_dir runs/mnist
# Two minutes before its time is up the job saves and queues itself again, and then goes on: docs/cluster.md
#SBATCH --job-name=ddpm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi
options=(--trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp)
srun --kill-on-bad-exit=1 python -m ddpm_lightning fit "${options[@]}" "$@" --ckpt_path last
