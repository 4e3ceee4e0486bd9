# Sourced by every example: where we are, which Python, and how trainings are started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python # what install.sh made, whatever other environment is active

# Print a command, and run it unless DRY_RUN=1.
execute() {
    local line
    printf -v line '%q ' "$@"
    echo "$line"
    [[ "${DRY_RUN:-0}" == 1 ]] || ${in_its_place:-} "$@"
}

# need REMEDY FILE...: leave with 2 where a file is missing, unless DRY_RUN=1.
need() {
    local file
    for file in "${@:2}"; do
        [[ -e "$file" || "${DRY_RUN:-0}" == 1 ]] || { echo "error: $file: is not there; $1" >&2; exit 2; }
    done
}

# Print how many processes to start: one for each CUDA device, of as many as are a power of two, since batches are.
processes() {
    local devices count=1
    devices=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)
    while ((2 * count <= devices)); do ((count *= 2)); done
    echo "$count"
}

# pretrain ar|mdm FLAGS...: NPROC processes, or what `processes` says.
pretrain() {
    local script
    case "$1" in
        ar) script=pretrain_gpt.py ;;
        mdm) script=pretrain_mdm.py ;;
        *) echo "error: pretrain $1: is neither ar nor mdm" >&2; return 2 ;;
    esac
    local count=${NPROC:-$(processes)}
    local launch=("$python")
    ((count > 1)) && launch+=(-m torch.distributed.run --standalone "--nproc_per_node=$count")
    execute "${launch[@]}" "$script" "${@:2}"
}

# beside NAME COMMAND...: run in the background, [NAME] before each line of its log. together: wait for all of them.
# Ctrl-C reaches them by itself; a SIGTERM is passed on, so that they save and leave.
beside_jobs=()
trap 'kill -TERM "${beside_jobs[@]}" 2>/dev/null || true' TERM
beside() {
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        "${@:2}"
        return
    fi
    in_its_place=exec "${@:2}" 2> >(sed -u "s/^/[$1] /" >&2) &
    beside_jobs+=($!)
}
together() {
    local job code=0
    for job in "${beside_jobs[@]}"; do
        wait "$job" || code=$?
        while kill -0 "$job" 2>/dev/null; do wait "$job" || code=$?; done # a signal interrupted the wait
    done
    beside_jobs=()
    return "$code"
}
