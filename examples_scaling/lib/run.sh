# Sourced by every example: working directory, Python, and functions that start training runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python # the environment of install.sh, whichever other one is active

# Print a command, and run it unless DRY_RUN=1.
execute() {
    local line
    printf -v line '%q ' "$@"
    echo "$line"
    [[ "${DRY_RUN:-0}" == 1 ]] || ${command_prefix:-} "$@"
}

# require_files REMEDY FILE...: exit with code 2 if a file is missing, unless DRY_RUN=1.
require_files() {
    local file
    for file in "${@:2}"; do
        [[ -e "$file" || "${DRY_RUN:-0}" == 1 ]] || { echo "error: $file: does not exist; $1" >&2; exit 2; }
    done
}

# Print the default world size: the largest power of two (batch sizes are) up to the number of CUDA devices, at least 1.
default_world_size() {
    local devices size=1
    devices=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)
    while ((2 * size <= devices)); do ((size *= 2)); done
    echo "$size"
}

# pretrain ar|mdm FLAGS...: train on NPROC ranks (default: default_world_size).
pretrain() {
    local script
    case "$1" in
        ar) script=pretrain_gpt.py ;;
        mdm) script=pretrain_mdm.py ;;
        *) echo "error: pretrain $1: is neither ar nor mdm" >&2; return 2 ;;
    esac
    local world_size=${NPROC:-$(default_world_size)}
    local launch=("$python")
    ((world_size > 1)) && launch+=(-m torch.distributed.run --standalone "--nproc_per_node=$world_size")
    execute "${launch[@]}" "$script" "${@:2}"
}

# in_background NAME COMMAND...: run in the background with [NAME] before each line of its log.
# wait_all: wait for all background jobs; fails if one failed.
# Ctrl-C reaches the jobs directly; SIGTERM is forwarded, so they save and exit.
background_jobs=()
trap 'kill -TERM "${background_jobs[@]}" 2>/dev/null || true' TERM
in_background() {
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        "${@:2}"
        return
    fi
    command_prefix=exec "${@:2}" 2> >(sed -u "s/^/[$1] /" >&2) &
    background_jobs+=($!)
}
wait_all() {
    local job code=0
    for job in "${background_jobs[@]}"; do
        wait "$job" || code=$?
        while kill -0 "$job" 2>/dev/null; do wait "$job" || code=$?; done # a signal interrupted the wait
    done
    background_jobs=()
    return "$code"
}
