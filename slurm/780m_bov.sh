#!/bin/bash
# Train the 780M model with a Bank of Values. From the repository's root:
#   sbatch slurm/780m_bov.sh                                     2 nodes of 8 GPUs
#   sbatch --nodes=4 slurm/780m_bov.sh train.steps=20            sbatch's flags before, the recipe's fields after
# docs/use/slurm.md lists everything that can be set.
#SBATCH --job-name=780m_bov
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --output=logs/slurm-%x-%j.out
#SBATCH --open-mode=append
# Two minutes before the time limit the run saves, ends and requeues itself; see docs/use/failures.md.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# Slurm runs a copy of this file, so the repository is found through the folder the job starts in.
[[ -f slurm/launch.sh ]] || { echo "no slurm/launch.sh in $PWD: sbatch --chdir=REPOSITORY, or call it there" >&2; exit 2; }
exec bash slurm/launch.sh recipes/780m_bov.yaml "$@"
