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

# pretrain ar|mdm FLAGS...: one process, or one for each CUDA device (NPROC overrides).
pretrain() {
    local script
    case "$1" in
        ar) script=pretrain_gpt.py ;;
        mdm) script=pretrain_mdm.py ;;
        *) echo "error: pretrain $1: is neither ar nor mdm" >&2; return 2 ;;
    esac
    local processes=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)}
    local launch=("$python")
    ((processes > 1)) && launch+=(-m torch.distributed.run --standalone "--nproc_per_node=$processes")
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
