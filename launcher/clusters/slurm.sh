#!/usr/bin/env bash
# A training as a Slurm job: one Ray node a machine, the driver on the first one.
#
#   sbatch slurm.sh
#
# Before its time is over, or when it is to make room, the job writes a checkpoint and is queued again; a machine that
# fails queues it again too. Each time it goes on where it stopped. Checked with stand-ins for Slurm's commands and the
# real `ray symmetric-run` on one machine; never run under a Slurm.
#
# Fill in: machines, GPUs and time here, and the three lines below.
#SBATCH --job-name=arat
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

recipe=${RECIPE:-imagenet_resnet50}
name=${NAME:-resnet50}
options=(--data.train /shared/imagenet/train.beton --data.val /shared/imagenet/val.beton --data.stage_to /tmp/arat
    --cluster.storage /shared/runs)

# An environment with the package, on all machines. In a container: srun's own options (--container-image=... of Pyxis)
# or `apptainer exec --nv IMAGE` before `ray`; then `kill` below has to reach into its pid namespace.
# source /shared/venv/bin/activate

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The address that the other machines reach: where /etc/hosts says 127.0.1.1, or for InfiniBand, name another.
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }'):${PORT:-6379}
gpus=${SLURM_GPUS_ON_NODE:-0}
workers=$((SLURM_JOB_NUM_NODES * (gpus > 0 ? gpus : 1)))
cpus=$((SLURM_CPUS_ON_NODE / (gpus > 0 ? gpus : 1)))

RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # in the environment, which other users can't read
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds for all machines to come; Ray's own 30 are too few

# SIGTERM goes to this script alone (B: above) and from here to the driver: symmetric-run itself would die of it and
# leave its processes behind. The driver runs on the first machine, as this script does.
driver=$(mktemp)
stopping=
stop() {
    stopping=1
    kill -TERM "$(cat "$driver")" || true
}
trap stop TERM
trap 'rm -f "$driver"' EXIT

# shellcheck disable=SC2016  # the inner shell fills in its own
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=0 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus "$gpus" -- \
    bash -c 'echo $$ >"$0"; exec "$@"' "$driver" \
    arat train "$recipe" --name "$name" --address "$address" --cluster.workers "$workers" \
    --cluster.gpus_per_worker "$((gpus > 0))" --cluster.cpus_per_worker "$cpus" "${options[@]}" &

# `wait` returns whenever the trap has run; the job is over when srun is.
status=0
while wait $! || status=$?; kill -0 $! 2>/dev/null; do status=0; done
if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
