#!/bin/bash
# Run one training job on the nodes of this Slurm allocation: launch.sh RECIPE [section.field=value ...]
# or, as one task, several runs that share its node: launch.sh --together TASKS LINE, for cells of a study (study.sh);
# or score a checkpoint: launch.sh --evaluate RUN STEP [option of bov evaluate ...] (evaluate.sh).
#
# Called by the scripts beside it; docs/use/slurm.md lists the variables it reads. One task is one
# rank; bov_megatron/parallel/launch.py derives rank and world size from Slurm's variables.
set -euo pipefail

die() {
    printf 'launch.sh: %s\n' "$*" >&2
    exit 2
}

# Address where rank 0 listens: Slurm's address of the first node, since its name (NodeName) need not resolve; then the
# name; then this host, which is the first node if sbatch started us.
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
[[ $1 != --together || $# == 3 ]] || die "usage: launch.sh --together TASKS LINE, called by study.sh"
[[ -n ${SLURM_JOB_ID:-} ]] || die "not in a Slurm job: submit one of the scripts beside it, e.g. sbatch slurm/780m_bov.sh"
[[ -n ${SLURM_NTASKS:-} ]] || die "the number of ranks is unknown: give sbatch or salloc --ntasks-per-node"
[[ -d bov_megatron ]] || die "$PWD is not the repository's root"
# shellcheck source=slurm/lifecycle.sh
source slurm/lifecycle.sh
hear_signals

python=${BOV_PYTHON:-${BOV_VENV:-$PWD/.venv}/bin/python}
command -v "$python" >/dev/null || die "$python does not exist: run 'make env' on a machine that shares this \
folder, or set BOV_VENV or BOV_PYTHON"
# `check` records the cost of the job, and what the ranks will need. What would stop them ends the job there.
if [[ $1 == --together ]]; then # `submit` has checked these
    what=(runs "line $3 of $2")
    check=(true)
    train=("$python" tools/study.py task "$2" "$3")
    again=("${train[@]}")
elif [[ $1 == --evaluate ]]; then
    what=(checkpoint "step $3 of $2")
    check=(true)
    train=("$python" tools/evaluate.py "$2" --step "$3" --record "${@:4}")
    again=(false)
    BOV_REQUEUE=0 # it would begin anew
else
    run=("${BOV_RECIPE:-$1}" "${@:2}")
    [[ -f ${run[0]} ]] || die "recipe ${run[0]} does not exist${BOV_RECIPE:+ (from BOV_RECIPE)}"
    if [[ -n ${BOV_OUTPUT_DIR:-} && " ${*:2}" != *" output_dir="* ]]; then # the command line's wins
        run+=("output_dir=$BOV_OUTPUT_DIR/{name}")
    fi
    what=(recipe "${run[*]}")
    train=("$python" -m bov_megatron.train "${run[@]}")
    check=("${train[@]}" --check --world-size "$SLURM_NTASKS" --nodes "$SLURM_JOB_NUM_NODES")
    again=("$python" tools/requeue.py "${run[@]}")
fi

MASTER_ADDR=${MASTER_ADDR:-$(find_master)}
export MASTER_ADDR
# A login script may have set some of torchrun's variables, which would take precedence over Slurm's.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK
# Since Slurm 22.05 srun doesn't inherit --cpus-per-task from sbatch, and ranks would share one core.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1
# Slurm before 23.02 doesn't tell jobs when they end; without a time limit there is nothing to tell.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    job_end=$(squeue --noheader --job="$this_job" --format=%e || true)
    SLURM_JOB_END_TIME=$(date -d "${job_end:-unknown}" +%s 2>/dev/null || true)
    export SLURM_JOB_END_TIME
fi
# Less memory lost between blocks of changing sizes.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
# Data workers and checkpoint writers are forked, which InfiniBand and EFA must be told.
export RDMAV_FORK_SAFE=${RDMAV_FORK_SAFE:-1} FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1}
# Flight recorder: each rank's last collectives, written where one times out.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$PWD/logs/collectives-$SLURM_JOB_ID-rank}
# Explicit, because with sbatch --export=NONE, some sites' default, ranks would see none of these variables.
srun=(srun --export=ALL)
if [[ -n ${BOV_SRUN_ARGS:-} ]]; then
    read -ra extra <<<"$BOV_SRUN_ARGS"
    srun+=("${extra[@]}")
fi

cat <<INFO
job       $SLURM_JOB_ID ($SLURM_JOB_NAME), $(date --iso-8601=seconds)${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}
$(printf '%-9s %s' "${what[@]}")
world     $SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), rank 0 at $MASTER_ADDR
folder    $PWD
commit    $(commit)
python    $python ($("$python" --version 2>&1 || true))
INFO

# End this script with a status, after requeueing the job if that makes sense.
finish() {
    requeue_unless_final "$1" "${again[@]}" || true
    exit "$1"
}

"${srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "${check[@]}" || finish $?
[[ -z $interrupted ]] || finish 143

# --kill-on-bad-exit: the other ranks would wait for a failed one until a collective times out.
# --label starts each line with the rank, as tracebacks of all ranks arrive at once.
# srun's own status is the highest of all ranks, or 143 once it has terminated some because another crashed. So rank 0,
# or the rank that ends the run, writes the run's status to a file; without one, the run crashed. All nodes see this
# folder, but it may be read-only; then the file is local, and only rank 0, which is on this node, can write it.
rm -f "$PWD/logs/.status-$SLURM_JOB_ID."* # of an earlier start that was killed
BOV_STATUS_FILE=$(mktemp -p "$PWD/logs" ".status-$SLURM_JOB_ID.XXXXXX" 2>/dev/null || mktemp)
export BOV_STATUS_FILE
status=0
run_with_signals "${srun[@]}" --kill-on-bad-exit=1 --label "${train[@]}" || status=$?
if [[ -s $BOV_STATUS_FILE ]]; then
    status=$(<"$BOV_STATUS_FILE")
elif [[ $status == 143 ]]; then
    status=1
fi
rm -f "$BOV_STATUS_FILE"
finish "$status"
