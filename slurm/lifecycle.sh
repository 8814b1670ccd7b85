# Functions of launch.sh for what comes from outside and what comes after: signals, and starting the job again.
# shellcheck shell=bash

# From here on pass signals to this job on to its ranks; `interrupted` then names the last one. Through scancel, because
# a SIGTERM to srun itself kills all ranks at once, without their hearing a signal.
hear_signals() {
    local name
    interrupted=''
    for name in TERM INT USR1 USR2; do
        # shellcheck disable=SC2064  # name is meant to be expanded now
        trap "interrupted=SIG$name
              echo 'launch.sh: passing SIG$name on to the ranks' >&2
              scancel --signal=$name $SLURM_JOB_ID || true" "$name"
    done
}

# Run a command in the background and wait for it, whatever signals are passed on meanwhile. In the background, because
# a shell that waits for a foreground command runs its traps only after that command has ended.
run_with_signals() {
    local pid status
    "$@" &
    pid=$!
    # A trapped signal ends `wait` early, with a status that a command might have, too. Asking whether there still is a
    # process of that number (kill -0) would find a later one that got the number again.
    while :; do
        interrupted='' status=0
        wait "$pid" || status=$? # bash remembers how it ended, and says so again
        [[ -n $interrupted ]] || break
    done
    return "$status"
}

# Queue this job again if that makes sense: requeue_unless_final STATUS PYTHON RECIPE [section.field=value ...].
# Not a job that somebody has cancelled or that has no batch script to start again (salloc).
requeue_unless_final() {
    local status=$1 job reason
    shift
    trap '' TERM INT USR1 USR2 # what is left to do is short, and the ranks are gone
    if [[ ${BOV_REQUEUE:-1} == 0 ]]; then
        echo "launch.sh: training ended with status $status; not started again: BOV_REQUEUE=0"
        return
    fi
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    if [[ $job != *" BatchFlag=1 "* || $job != *" JobState=RUNNING "* ]]; then
        echo "launch.sh: training ended with status $status; not started again:" \
            "$(grep -oE '(JobState|BatchFlag)=[A-Z0-9_]+' <<<"$job" | tr '\n' ' ')"
        return
    fi
    if reason=$("$1" tools/requeue.py --status "$status" "${@:2}" 2>&1); then
        echo "launch.sh: training ended with status $status; starting it again: $reason"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "launch.sh: training ended with status $status; not started again: $reason"
    fi
}
