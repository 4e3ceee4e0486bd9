# Sourced by every example: where we are, which Python, and how trainings are started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[[ -n "${VIRTUAL_ENV:-}" ]] && python=$VIRTUAL_ENV/bin/python

# Print a command, and run it unless DRY_RUN=1.
execute() {
    local line
    printf -v line '%q ' "$@"
    echo "$line"
    [[ "${DRY_RUN:-0}" == 1 ]] || "$@"
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
beside_jobs=()
beside() {
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        "${@:2}"
        return
    fi
    "${@:2}" 2> >(sed -u "s/^/[$1] /" >&2) &
    beside_jobs+=($!)
}
together() {
    local job code=0
    for job in "${beside_jobs[@]}"; do
        wait "$job" || code=$?
    done
    beside_jobs=()
    return "$code"
}
