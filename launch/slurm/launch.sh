#!/bin/bash
# Start the deepspeed launcher on every node of an allocation, with a hostfile made from it; no ssh. For trying things out:
# jobs that shall survive their time limit are pretrain.sbatch's.
#
#   salloc --nodes=2 --gpus-per-node=8 launch/slurm/launch.sh --ds_config configs/ds/zero2-bf16.json --config RECIPE
#
# SLOTS: ranks a node (default: its GPUs, else its tasks).
set -eu
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "launch.sh: error: not inside an allocation; start it with salloc" >&2
    exit 2
fi
slots=${SLOTS:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
hostfile=$PWD/hostfile-$SLURM_JOB_ID # a folder that all nodes see
trap 'rm -f "$hostfile"' EXIT
while read -r node; do echo "$node slots=$slots"; done <<<"$nodes" >"$hostfile"
train=$(dirname "$0")/../train.py
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    bash -c 'exec deepspeed --no_ssh --node_rank "$SLURM_NODEID" "$@"' node \
    --hostfile "$hostfile" --master_addr "${nodes%%$'\n'*}" --master_port $((20000 + SLURM_JOB_ID % 10000)) \
    "$train" "$@"
