#!/usr/bin/env bash
# What only a GPU shows, in one call: the tests of CUDA, a step of each size beside its peers, what settings cost.
#   bash benchmarks/gpu.sh [tests] [140M] [425M] [1018M] [2283M] [settings]      all of them without a name
# One H200 is assumed. OUT names the folder for figures and logs (default results/gpu); PUBLISHED is a clone of the
# published system (default ../diffusion-data-constraint), left out where it is not there; PYTHON names the interpreter
# (default .venv/bin/python), which has the extras test and fp8 and the peers; DRY_RUN=1 prints the commands. What fails
# is told at the end, and the rest goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-results/gpu} published=${PUBLISHED:-../diffusion-data-constraint}
failed=()

# measure NAME COMMAND...: run it, its output beside the figures.
measure() {
    local line
    printf -v line '%q ' "${@:2}"
    echo "$line"
    [[ "${DRY_RUN:-0}" == 1 ]] || "${@:2}" 2>&1 | tee "$out/$1.log" || failed+=("$1")
}

# step SIZE SAMPLES MICRO_BATCHES NAME FLAGS...: 131,072 tokens an optimizer step.
step() {
    measure "$4" "$python" benchmarks/train_step.py --model-size "$1" --seq-length 2048 --micro-batch-size "$2" \
        --micro-batches "$3" --rounds 5 --output "$out/$4.json" "${@:5}"
}

tune() {
    measure "$1" "$python" tools/tune.py --seq-length 2048 --output "$out/$1.json" "${@:2}"
}

known=(tests 140M 425M 1018M 2283M settings)
(($# > 0)) || set -- "${known[@]}"
for name in "$@"; do
    [[ " ${known[*]} " == *" $name "* ]] || { echo "error: gpu.sh $name: is none of ${known[*]}" >&2; exit 2; }
done
beside=()
[[ -d "$published" ]] && beside=(--published "$published")
[[ "${DRY_RUN:-0}" == 1 ]] || mkdir -p "$out"
for name in "$@"; do
    case "$name" in
        tests) measure tests "$python" -m pytest -q -m gpu -n 6 tests/test_cuda.py ;;
        140M) step 140M 8 8 140M "${beside[@]}" ;;
        425M) step 425M 8 8 425M "${beside[@]}" --only "* compiled" ${beside:+"published MDM*"} ;;
        1018M)
            step 1018M 8 8 1018M --only "* AR compiled" "ours MDM *compiled"
            ((${#beside[@]})) && step 1018M 4 16 1018M-published "${beside[@]}" \
                --only "ours MDM dropout compiled" "published MDM dropout eager"
            ;;
        2283M)
            for peer in nanogpt transformers litgpt; do # all of them at once do not fit
                step 2283M 4 16 "2283M-$peer" --only "ours *compiled" "$peer AR compiled"
            done
            ((${#beside[@]})) && step 2283M 2 32 2283M-published "${beside[@]}" \
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
