# shellcheck shell=bash disable=SC2034  # the scripts read what the functions leave
# What the scripts of this folder share. They source it in the project's folder.

fail() {
    echo "error: $*" >&2
    exit 2
}

# in_queue: whether this is the job, and not somebody who submits it. SLURM_JOB_ID does not tell: it is set in every
# shell inside an allocation, too (salloc, an editor or a tmux on a node).
in_queue() { [ "${0##*/}" = slurm_script ]; }

# What such a shell inherited speaks of its own allocation: sbatch would hand it on to the job, whose srun would take it
# for its own.
if ! in_queue; then
    for name in "${!SLURM_@}"; do
        case $name in SLURM_CONF | SLURM_CONF_SERVER | SLURM_JWT) ;; *) unset "$name" ;; esac
    done
fi

# JOB: this job, and no other. One task of an array has the number of the array, by which Slurm means all tasks.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID-}}
JOB=${JOB:-${SLURM_JOB_ID-}}

# here COMMAND...: run Python beside the ranks, outside of srun.
here() { "${CONTAINER[@]}" "$HOST_PYTHON" "$@"; }

# submit SCRIPT OPTION...: put SCRIPT into the queue with the options QUEUE and OPTION... and the arguments PROGRAM.
submit() {
    type -P sbatch >/dev/null || fail "sbatch is not there: run this on a login node of a Slurm cluster"
    sbatch "${QUEUE[@]}" "${@:2}" "$1" "${PROGRAM[@]}"
}

# split PATTERN ARGUMENT...: what stands before the first argument that matches PATTERN is for sbatch, the rest for the
# program.
split() {
    local pattern=$1
    shift
    QUEUE=() PROGRAM=()
    while [ $# -gt 0 ] && [[ ! $1 =~ ^($pattern)$ ]]; do
        QUEUE+=("$1")
        shift
    done
    PROGRAM=("$@")
    [ $# -gt 0 ] || fail "no argument is $pattern: what comes before it is for sbatch, what follows for the program"
}

# take_array: move --array from QUEUE to ARRAY, and count its tasks in SHARDS. It must be one range: a task's place in it
# is the shard that it does.
take_array() {
    local others=()
    ARRAY=
    set -- "${QUEUE[@]}"
    while [ $# -gt 0 ]; do
        case $1 in
            -a | --array) ARRAY=${2-} && shift $(($# > 1)) ;;
            --array=*) ARRAY=${1#*=} ;;
            *) others+=("$1") ;;
        esac
        shift
    done
    [[ $ARRAY =~ ^([0-9]+)-([0-9]+)(%[0-9]+)?$ ]] || fail "--array '$ARRAY': give one range, such as 0-63 or 0-63%16"
    SHARDS=$((BASH_REMATCH[2] - BASH_REMATCH[1] + 1))
    QUEUE=("${others[@]}")
}

# ranks_per_node: --ntasks-per-node, else one for each GPU, else one.
ranks_per_node() { echo "${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"; }

# begin PROGRAM...: note the start of the run that `PROGRAM... --print_config` describes, and listen to Slurm.
begin() {
    SETTINGS=$(here "$@" --print_config) || exit
    RUN_DIR=$(here tools/job.py begin --job "$SLURM_JOB_ID" --restart "${SLURM_RESTART_COUNT:-0}" \
        --nodes "$SLURM_JOB_NODELIST" <<<"$SETTINGS") || exit
    TIME_LIMIT=false HEARD=
    trap 'HEARD=yes TIME_LIMIT=true; echo "the time limit of job $SLURM_JOB_ID" >"$RUN_DIR/stop"' USR1
    trap 'HEARD=yes' TERM # scancel and the like: the step gets it too, and ends
}

# torchrun PROGRAM ARGUMENT...: one torchrun on every node. Leaves the exit code in CODE.
torchrun() {
    local head address
    # The address at which Slurm itself reaches the node: every node can.
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    address=$(scontrol show node --oneliner "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    # Slurm sends SIGTERM to every process of a step. It is for the ranks, which save and stop: torchrun would give them
    # 30 seconds for it.
    # shellcheck disable=SC2016  # for the bash inside
    step --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        bash -c 'trap "" TERM; exec "$@"' torchrun \
        "${CONTAINER[@]}" "$PYTHON" -m torch.distributed.run --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$(ranks_per_node)" --max-restarts "$MAX_RESTARTS" \
        --rdzv-backend c10d --rdzv-endpoint "$address:$((20000 + SLURM_JOB_ID % 10000))" \
        --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" "$@"
}

# step SRUN_OPTION... COMMAND...: run a step. Leaves the exit code in CODE.
step() {
    srun --kill-on-bad-exit=1 --cpu-bind=none "${SRUN_OPTIONS[@]}" "$@" &
    HEARD=yes
    while [ "$HEARD" ]; do # a signal ends `wait`, and not the step
        HEARD=
        wait $! && CODE=0 || CODE=$?
    done
}

# settle: end the job as the run and its history say, or put it back into the queue.
settle() {
    local verdict=0
    here tools/job.py end --exit_code "$CODE" --time_limit "$TIME_LIMIT" \
        --state "$(scontrol show job --oneliner "$JOB" || true)" <<<"$SETTINGS" || verdict=$?
    [ "$verdict" = 75 ] || exit "$verdict"
    requeue
}

# requeue: put this job back into the queue, and end it.
requeue() {
    local tries=10
    until scontrol requeue "$JOB"; do
        [ $((tries--)) -gt 0 ] || fail "Slurm does not take job $JOB back into the queue: submit it again"
        sleep 30
    done
    exit 0
}

# try_again REASON: requeue a job that keeps what it has finished, as often as the site lets it. One that is not running
# was ended by Slurm, which knows whether to start it again.
try_again() {
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$TASK_RESTARTS" ] || return 0
    [[ $(scontrol show job --oneliner "$JOB") == *JobState=RUNNING* ]] || return 0
    echo "$1: back into the queue"
    requeue
}

EMU3_SITE=${EMU3_SITE:-slurm/env.sh}
[ -r "$EMU3_SITE" ] || fail "site file $EMU3_SITE is missing: set EMU3_SITE to yours, or restore slurm/env.sh"
# shellcheck source=slurm/env.sh
. "$EMU3_SITE"
[ ${#CONTAINER[@]} -gt 0 ] || type -P "$HOST_PYTHON" >/dev/null ||
    fail "$HOST_PYTHON is not there: run make build, or set PYTHON in $EMU3_SITE"
[ "$HOST_PYTHON" != "$PYTHON" ] || here -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' ||
    fail "$PYTHON has no torch, and so no torchrun: run make build, or set PYTHON in $EMU3_SITE"
