#!/bin/bash
# Run one training job on the nodes of this Slurm allocation: launch.sh RECIPE [section.field=value ...]
#
# The scripts beside it call it with their recipe; docs/use/slurm.md lists the variables it reads. One task is one rank.
# Tasks find their rank, world and master through bov_megatron/parallel/launch.py, from Slurm's own variables.
set -euo pipefail

die() {
    printf 'launch.sh: %s\n' "$*" >&2
    exit 2
}

# Where rank 0 listens. Slurm's address of the first node comes first, since its name need not resolve (NodeName is
# Slurm's own affair); then the name; then this host, which is the first node whenever sbatch started us.
find_master() {
    local node address candidate
    node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol show node "$node" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
    for candidate in "$address" "$node" "$(hostname -f 2>/dev/null)" "$(hostname)"; do
        if [[ -n $candidate ]] && getent hosts "$candidate" >/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "none of '$address', '$node' and '$(hostname)' resolves: set MASTER_ADDR to an address of the first node"
}

commit() {
    local id
    if id=$(git rev-parse --short=12 HEAD 2>/dev/null); then
        if [[ -n $(git status --porcelain --untracked-files=no 2>/dev/null) ]]; then
            id+=" with uncommitted changes"
        fi
        echo "$id"
    else
        echo "unknown (no git here)"
    fi
}

[[ $# -ge 1 ]] || die "usage: launch.sh RECIPE [section.field=value ...], called by the scripts beside it"
[[ -n ${SLURM_JOB_ID:-} ]] || die "not in a Slurm job: submit one of the scripts beside it, e.g. sbatch slurm/780m_bov.sh"
[[ -n ${SLURM_NTASKS:-} ]] || die "the number of ranks is unknown: give sbatch or salloc --ntasks-per-node"
[[ -d bov_megatron ]] || die "$PWD is not the repository's root"
# shellcheck source=slurm/lifecycle.sh
source slurm/lifecycle.sh
hear_signals

recipe=${BOV_RECIPE:-$1}
overrides=("${@:2}")
python=${BOV_PYTHON:-${BOV_VENV:-$PWD/.venv}/bin/python}
[[ -f $recipe ]] || die "recipe $recipe does not exist${BOV_RECIPE:+ (from BOV_RECIPE)}"
command -v "$python" >/dev/null || die "$python does not exist: run 'make env' on a machine that shares this \
folder, or set BOV_VENV or BOV_PYTHON"
if [[ -n ${BOV_OUTPUT_DIR:-} && " ${overrides[*]-}" != *" output_dir="* ]]; then # the command line's wins
    overrides+=("output_dir=$BOV_OUTPUT_DIR/{name}")
fi

MASTER_ADDR=${MASTER_ADDR:-$(find_master)}
export MASTER_ADDR
# Not torchrun's variables, which a login script may have left half set: ranks are Slurm's.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK
# srun of Slurm 22.05 and later no longer takes --cpus-per-task from sbatch: ranks would share one core.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1
# sbatch --export=NONE, which some sites make the default, would otherwise hide all of this from the ranks.
srun=(srun --export=ALL)
if [[ -n ${BOV_SRUN_ARGS:-} ]]; then
    read -ra extra <<<"$BOV_SRUN_ARGS"
    srun+=("${extra[@]}")
fi

cat <<INFO
job       $SLURM_JOB_ID ($SLURM_JOB_NAME), $(date --iso-8601=seconds)${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}
recipe    $recipe ${overrides[*]-}
world     $SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), rank 0 at $MASTER_ADDR
folder    $PWD
commit    $(commit)
python    $python ($("$python" --version 2>&1 || true))
INFO

# The end of this script, with the status of whatever has ended; Slurm may then start it again.
finish() {
    requeue_unless_final "$1" "$python" "$recipe" ${overrides[@]+"${overrides[@]}"} || true
    exit "$1"
}

# What the job is about to cost, for the record. A recipe that cannot run on this many ranks ends the job here, with
# one error instead of one per rank.
"${srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 \
    "$python" tools/plan.py --world-size "$SLURM_NTASKS" "$recipe" ${overrides[@]+"${overrides[@]}"} || finish $?
[[ -z $interrupted ]] || finish 143

# A rank that fails takes the others with it: they would wait for it in a collective until that times out.
# --label begins each line with its rank, as tracebacks of all ranks arrive at once.
# srun's own status is the highest of all ranks', and 143 once it has terminated some because another one crashed. The
# run's status is what rank 0 leaves in a file, or whichever rank ends the run; if none could leave any, it crashed.
# All nodes see this folder, but it may be read-only; then it is rank 0's file alone, which runs on this node.
rm -f "$PWD/logs/.status-$SLURM_JOB_ID."* # of an earlier start that was killed
BOV_STATUS_FILE=$(mktemp -p "$PWD/logs" ".status-$SLURM_JOB_ID.XXXXXX" 2>/dev/null || mktemp)
export BOV_STATUS_FILE
status=0
run_with_signals "${srun[@]}" --kill-on-bad-exit=1 --label \
    "$python" -m bov_megatron.train "$recipe" ${overrides[@]+"${overrides[@]}"} || status=$?
if [[ -s $BOV_STATUS_FILE ]]; then
    status=$(<"$BOV_STATUS_FILE")
elif [[ $status == 143 ]]; then
    status=1
fi
rm -f "$BOV_STATUS_FILE"
finish "$status"
