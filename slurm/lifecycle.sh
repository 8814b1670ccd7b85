# Functions of launch.sh: passing signals on to the ranks, and requeueing the job.
# shellcheck shell=bash

# This job, as scancel and scontrol take it. The last task of an array has the array's own number in SLURM_JOB_ID, which
# means all its tasks to them.
this_job=${SLURM_JOB_ID:-}
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# Pass signals to this job on to its ranks from now on; `interrupted` names the last one. With scancel, because on
# SIGTERM srun itself kills all ranks without passing the signal on.
hear_signals() {
    local name
    interrupted=''
    for name in TERM INT USR1 USR2; do
        # shellcheck disable=SC2064  # name is meant to be expanded now
        trap "interrupted=SIG$name
              echo 'launch.sh: passing SIG$name on to the ranks' >&2
              scancel --signal=$name $this_job || true" "$name"
    done
}

# Run a command and wait until it ends, while signals are passed on. In the background, because a shell runs its traps
# only after a foreground command has ended.
run_with_signals() {
    local pid status
    "$@" &
    pid=$!
    # A trapped signal ends `wait` early, with a status that the command could have too. `kill -0` could find another
    # process that was given the same id.
    while :; do
        interrupted='' status=0
        wait "$pid" || status=$? # bash remembers the command's status
        [[ -n $interrupted ]] || break
    done
    return "$status"
}

# Requeue this job if that makes sense: requeue_unless_final STATUS COMMAND [ARGUMENT ...], where the command, given
# --status STATUS, says why and ends with 0 to start again. Not if it was cancelled or has no batch script (salloc).
requeue_unless_final() {
    local status=$1 job reason
    shift
    trap '' TERM INT USR1 USR2 # the ranks are gone, and the rest is short
    if [[ ${BOV_REQUEUE:-1} == 0 ]]; then
        echo "launch.sh: training ended with status $status; not started again: BOV_REQUEUE=0"
        return
    fi
    job=$(scontrol --oneliner show job "$this_job")
    if [[ $job != *" BatchFlag=1 "* || $job != *" JobState=RUNNING "* ]]; then
        echo "launch.sh: training ended with status $status; not started again:" \
            "$(grep -oE '(JobState|BatchFlag)=[A-Z0-9_]+' <<<"$job" | tr '\n' ' ')"
        return
    fi
    if reason=$("$@" --status "$status" 2>&1); then
        echo "launch.sh: training ended with status $status; starting it again: $reason"
        scontrol requeue "$this_job"
    else
        echo "launch.sh: training ended with status $status; not started again: $reason"
    fi
}
