#!/bin/bash
# What the job scripts beside this one share: train on every task of the job, and queue the job again if steps are left.
# Ranks are started by srun, without a launcher in between, so that SLURM's signals reach them: USR1 before the limit
# of time, TERM at a preemption. Each makes the run save and exit 0.
set -euo pipefail

CONFIG=${CONFIG:-configs/enwik8_t64.yaml}
RUN=${RUN:-runs/enwik8_t64}
STEPS=${STEPS:-4000000}
PYTHON=${PYTHON:-.venv/bin/python}

for flag in "$@"; do
  case $flag in --run.dir | --run.dir=* | --train.steps | --train.steps=*)
    echo "error: $flag: set RUN and STEPS before sbatch instead; they tell, too, when the run is done" >&2
    exit 2
  esac
done

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"

# Single quotes: each rank has its own SLURM_PROCID.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec "$@"' \
  -- "$PYTHON" scripts/train.py --config "$CONFIG" --run.dir="$RUN" --train.steps="$STEPS" --run.auto_resume=true "$@"

if [ ! -d "$RUN/checkpoints/$(printf 'step-%08d' "$STEPS")" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
