#!/usr/bin/env bash
# All measurements that need a GPU: CUDA tests, a training step of each size against its peers, the cost of settings.
#   bash benchmarks/gpu.sh [tests] [140M] [425M] [1018M] [2283M] [settings]      without arguments all of them
# Sized for one H200. Variables: OUT, the folder for figures and logs (default results/gpu); PUBLISHED, a clone of the
# published system (default ../diffusion-data-constraint), skipped if it does not exist; PYTHON, the interpreter
# (default .venv/bin/python if it exists, else python3), with the extras test and fp8 and the peers installed; LIMIT,
# the seconds after which each measurement is ended (default none): a step's figures are written after every round;
# DRY_RUN=1 prints the commands. A failure does not stop the other measurements; failures are listed at the end.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python}
[[ -n "${PYTHON:-}" || -x "$python" ]] || python=python3
out=${OUT:-results/gpu} published=${PUBLISHED:-../diffusion-data-constraint}
failed=() limit=()
[[ -z "${LIMIT:-}" ]] || limit=(timeout --kill-after=5 "$LIMIT")

# measure NAME COMMAND...: run a command and log its output to NAME.log.
measure() {
    local line command=("${limit[@]}" "${@:2}")
    printf -v line '%q ' "${command[@]}"
    echo "$line"
    [[ "${DRY_RUN:-0}" == 1 ]] || "${command[@]}" 2>&1 | tee "$out/$1.log" || failed+=("$1")
}

# step SIZE MICRO_BATCH_SIZE MICRO_BATCHES NAME FLAGS...: time optimizer steps of 131,072 tokens.
step() {
    measure "$4" "$python" benchmarks/training_step/run.py --model-size "$1" --seq-length 2048 --micro-batch-size "$2" \
        --micro-batches "$3" --rounds 5 --output "$out/$4.json" "${@:5}"
}

# tune NAME FLAGS...: find the fastest micro-batch size, recomputation and compilation with tools/tune.py.
tune() {
    measure "$1" "$python" tools/tune.py --seq-length 2048 --output "$out/$1.json" "${@:2}"
}

names=(tests 140M 425M 1018M 2283M settings)
(($# > 0)) || set -- "${names[@]}"
for name in "$@"; do
    if [[ " ${names[*]} " != *" $name "* ]]; then
        echo "error: gpu.sh $name: not a measurement; choose from ${names[*]}" >&2
        exit 2
    fi
done
published_flags=()
[[ -d "$published" ]] && published_flags=(--published "$published")
[[ "${DRY_RUN:-0}" == 1 ]] || mkdir -p "$out"
for name in "$@"; do
    case "$name" in
        tests) measure tests "$python" -m pytest -q -m gpu -n 8 --dist load tests/test_cuda.py ;;
        140M) step 140M 8 8 140M "${published_flags[@]}" ;;
        425M) step 425M 8 8 425M "${published_flags[@]}" --only "* compiled" ${published_flags:+"published MDM*"} ;;
        1018M)
            step 1018M 8 8 1018M --only "* AR compiled" "ours MDM *compiled"
            ((${#published_flags[@]})) && step 1018M 4 16 1018M-published "${published_flags[@]}" \
                --only "ours MDM dropout compiled" "published MDM dropout eager"
            ;;
        2283M)
            for peer in nanogpt transformers litgpt; do # all at once do not fit into memory
                step 2283M 4 16 "2283M-$peer" --only "ours *compiled" "$peer AR compiled"
            done
            ((${#published_flags[@]})) && step 2283M 2 32 2283M-published "${published_flags[@]}" \
                --only "ours MDM dropout compiled" "published MDM dropout eager"
            ;;
        settings)
            tune tune --model-size 140M
            tune deterministic --model-size 140M --deterministic
            tune bf16 --model-size 2283M --micro-batch-max 16
            tune fp8 --model-size 2283M --micro-batch-max 16 --fp8-recipe tensorwise
            ;;
    esac
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
