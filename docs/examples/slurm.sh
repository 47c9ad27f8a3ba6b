#!/usr/bin/env bash
# Trains on two nodes with eight GPUs each, and goes on in a new job where the time limit cuts it: sbatch docs/examples/slurm.sh
#SBATCH --job-name=flowtape
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Two minutes before the limit every task is sent SIGUSR1: the run saves, says how to go on, and ends with 138.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

RECIPE=${RECIPE:-my_recipe.yaml}
RUN=${RUN:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}

# A requeued job keeps its number, and so its run.
if [ -e "$RUN/checkpoints/LATEST" ]; then
    what=(--resume "$RUN")
else
    what=("$RECIPE" --set "run_dir=$RUN")
fi

# Ranks meet on the job's first node; Slurm's own numbers say who is who.
srun --kill-on-bad-exit=1 flowtape train "${what[@]}" --device cuda
code=$?

# 138 is 128 and SIGUSR1's 10.
if [ "$code" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
