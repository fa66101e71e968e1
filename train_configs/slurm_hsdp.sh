#!/bin/bash
# A run on several hosts under SLURM: one torchrun agent a host, which starts one process a GPU.
#
#   sbatch --nodes=2 train_configs/slurm_hsdp.sh train --config published/vapi_xxl_384_two_hosts
#
# Everything after the script's name is the job and its flags, as after the command `grpo`. Start it with the
# environment active that has the project installed, in a folder that every host sees, as it must see the run's.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: sbatch [options] $0 JOB --config NAME [--section.key VALUE ...]" >&2
    exit 2
fi

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of the job's own, so that two jobs may share a host.
port=$((20000 + SLURM_JOB_ID % 20000))

# Each start of the processes meets at a store of its own: with the agents' shared one a host that comes back is told an
# address that was published before it left, and waits in vain (torch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# `--requeue` covers the loss of a host, and of the first one in particular, which has the rendezvous: SLURM starts the
# job again, and it goes on from its newest checkpoint. `--max-restarts` covers the loss of a process. An agent that has
# given up ends the whole job, because the others would wait for it.
exec srun --kill-on-bad-exit=1 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --max-restarts=20 \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first_host:$port" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m grpo "$@"
