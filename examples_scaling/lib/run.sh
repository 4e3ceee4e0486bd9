# shellcheck shell=bash
# Sourced by every example: working directory, Python, and functions that start training, evaluation and scoring.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python # the environment of install.sh, whichever other one is active

# seconds that torchrun gives its ranks to save after a signal, from torch 2.13 on; 30 before
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

# Commands are jobs, since bash handles no signal while a command runs in the foreground. Ctrl-C reaches them directly;
# what a scheduler sends to the script is forwarded as SIGTERM. They save and exit, and then the script exits.
jobs=()
trap 'kill -TERM "${jobs[@]}" 2>/dev/null || exit 143' TERM USR1 USR2
trap '((${#jobs[@]})) || exit 130' INT

# Print a command, and run it unless DRY_RUN=1. With command_prefix="exec" the command replaces the script, and so gets
# the signals of a launcher.
execute() {
    local line
    printf -v line '%q ' "$@"
    echo "$line"
    if [[ "${DRY_RUN:-0}" == 1 ]]; then return; fi
    [[ "${command_prefix:-}" != exec ]] || exec "$@"
    "$@" &
    jobs+=($!)
    wait_all
}

# Wait for all jobs; fails if one failed, or after a signal.
wait_all() {
    local job code=0
    for job in "${jobs[@]}"; do
        wait "$job" || code=$?
        while kill -0 "$job" 2>/dev/null; do wait "$job" || code=$?; done # a signal interrupted the wait
    done
    jobs=()
    return "$code"
}

# published COMMAND...: facts of the published experiments, by examples_scaling/lib/published.py.
published() {
    [[ -x "$python" ]] || { echo "error: $python: does not exist; bash install.sh creates it" >&2; return 2; }
    "$python" examples_scaling/lib/published.py "$@"
}

# warmup_samples UNIQUE_TOKENS EPOCHS PERCENT: print a percentage of a budget, in samples of 2048 tokens.
warmup_samples() {
    [[ "$3" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]] || {
        echo "error: WARMUP=$3: is not a percentage of the budget; give a number, such as 0.5" >&2
        return 2
    }
    awk -v unique="$1" -v epochs="$2" -v percent="$3" \
        'BEGIN { printf "%.0f\n", int(int(unique * epochs / 2048) * percent / 100) }'
}

# require_files REMEDY FILE...: exit with code 2 if a file is missing, unless DRY_RUN=1.
require_files() {
    local file
    for file in "${@:2}"; do
        [[ -e "$file" || "${DRY_RUN:-0}" == 1 ]] || { echo "error: $file: does not exist; $1" >&2; exit 2; }
    done
}

# Print the default world size: the largest power of two (batch sizes are) up to the number of CUDA devices that are
# visible, at least 1.
default_world_size() {
    local devices visible size=1
    devices=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true) # of the machine
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        ((${#visible[@]} >= devices)) || devices=${#visible[@]}
    fi
    while ((2 * size <= devices)); do ((size *= 2)); done
    echo "$size"
}

# Print where the ranks of several nodes meet: RDZV_ENDPOINT, or the first node of a SLURM job.
rendezvous() {
    local hosts
    if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
        echo "$RDZV_ENDPOINT"
    elif [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null) || hosts=""
        [[ -n "$hosts" ]] || {
            echo "error: SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST: scontrol does not list its nodes (it is missing in" \
                "containers); give RDZV_ENDPOINT=HOST:PORT, a free port of one node" >&2
            return 2
        }
        echo "${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))"
    elif [[ "${DRY_RUN:-0}" == 1 ]]; then
        echo node-0:29500
    else
        echo "error: NNODES=$NNODES: needs RDZV_ENDPOINT outside SLURM; give HOST:PORT, a free port of one node" >&2
        return 2
    fi
}

# Set `launch` to the command that starts a program on NPROC ranks (default: default_world_size) of each of NNODES nodes
# (default 1); with several nodes the script is started once on each.
set_launch() {
    local world_size=${NPROC:-$(default_world_size)} name=${0##*/} endpoint
    require_files "bash install.sh creates it" "$python"
    launch=("$python")
    if ((${NNODES:-1} > 1)); then
        endpoint=$(rendezvous)
        launch+=(-m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$world_size" --rdzv-backend c10d
            --rdzv-id "${SLURM_JOB_ID:-${name%.sh}}" --rdzv-endpoint "$endpoint"
            --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")
    elif ((world_size > 1)); then
        launch+=(-m torch.distributed.run --standalone "--nproc_per_node=$world_size")
    fi
}

# pretrain ar|mdm FLAGS...: train or evaluate; DRY_RUN=1 also prints what a model of the ladder costs to train.
pretrain() {
    local script
    case "$1" in
        ar) script=pretrain_gpt.py ;;
        mdm) script=pretrain_mdm.py ;;
        *) echo "error: OBJECTIVE=$1: is neither ar nor mdm; give one of them" >&2; return 2 ;;
    esac
    local launch
    set_launch
    execute "${launch[@]}" "$script" "${@:2}" || return
    [[ "${DRY_RUN:-0}" != 1 || "$*" != *" --model-size "* || "$*" == *" --skip-train "* ]] ||
        published cost "$1" "${unique_tokens:-0}" "${@:2}"
}

# score RUN FLAGS...: score a run on downstream tasks.
score() {
    local launch
    require_files "train it, or name another run: LOAD=runs/NAME" "$1"
    set_launch
    execute "${launch[@]}" -m megatron.scoring.lm_eval_cli --pretrained "$@"
}

# in_background NAME COMMAND...: run a job, until `wait_all`, with [NAME] before each line of its log.
in_background() {
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        "${@:2}"
        return
    fi
    command_prefix="exec" "${@:2}" 2> >(sed -u "s/^/[$1] /" >&2) &
    jobs+=($!)
}
