#!/bin/bash
# Score a checkpoint by what its run's recipe lists under `evaluation`: evaluate.sh RUN STEP [option of bov evaluate ...]
#   sbatch slurm/evaluate.sh runs/780m_bov 1000                                            one GPU
#   sbatch --ntasks-per-node=4 --gpus-per-node=4 slurm/evaluate.sh runs/13b_bov 1000 --tensor-parallel 4
# The scores go to RUN/evaluations/. A run with evaluation.where=slurm submits this itself; docs/use/evaluation.md.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=6
#SBATCH --time=02:00:00
#SBATCH --output=logs/slurm-%x-%j.out
# Slurm runs a copy of this file, so the repository is found through the folder the job starts in.
[[ -f slurm/launch.sh ]] || { echo "no slurm/launch.sh in $PWD: sbatch --chdir=REPOSITORY, or call it there" >&2; exit 2; }
[[ $# -ge 2 ]] || { echo "usage: evaluate.sh RUN STEP [option of bov evaluate ...]" >&2; exit 2; }
exec bash slurm/launch.sh --evaluate "$@"
