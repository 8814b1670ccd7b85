#!/bin/bash
# One task of an array of a study's cells: study.sh alone|together TASKS. Submitted by `python tools/study.py submit`,
# which also says how many nodes and ranks; docs/use/studies.md.
#   alone       line SLURM_ARRAY_TASK_ID of the file TASKS (from 0) is one run, as given to launch.sh
#   together    it is several, which share the node
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --open-mode=append
# Two minutes before the time limit the runs save, end and requeue themselves; see docs/use/failures.md.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# Slurm runs a copy of this file, so the repository is found through the folder the job starts in.
[[ -f slurm/launch.sh ]] || { echo "no slurm/launch.sh in $PWD: submit from the repository's root" >&2; exit 2; }
unset BOV_RECIPE BOV_OUTPUT_DIR # they are for the other scripts; a cell has its own
if [[ $1 == together ]]; then
    exec bash slurm/launch.sh --together "$2" "$SLURM_ARRAY_TASK_ID"
fi
eval "run=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$2"))" # quoted for a shell
exec bash slurm/launch.sh "${run[@]}"
