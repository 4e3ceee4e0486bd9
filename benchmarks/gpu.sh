#!/usr/bin/env bash
# All measurements that need a GPU, in stages by value, sized for one H200 that is there for some minutes.
#   bash benchmarks/gpu.sh [checks] [speed] [large] [settings] [layouts] [published] [tests]
# Each measurement has its own time limit and writes its figures as it goes, so that ending it loses little. Stages that
# share a call of nine minutes: checks speed | large settings | layouts published; tests needs five more. Without
# arguments all measurements run that OUT does not have yet. benchmarks/report_gpu.py makes tables of the figures.
# Variables: OUT, the folder for figures and log, at most eight files (default results/gpu); PYTHON, the interpreter
# (default .venv/bin/python if it exists, else python3); WHEELS, a folder of wheels of packages that it lacks (default
# .whl), used without being installed; PUBLISHED, a clone of the published system (default ../diffusion-data-constraint);
# SLOWER=N multiplies the time limits; REHEARSAL=1 runs the plan at toy size on a CPU; DRY_RUN=1 prints the commands.
# A failure does not stop the other measurements; failures are listed at the end.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python}
[[ -n "${PYTHON:-}" || -x "$python" ]] || python=python3
out=${OUT:-results/gpu} wheels=${WHEELS:-.whl} published=${PUBLISHED:-../diffusion-data-constraint}
dry_run=${DRY_RUN:-0} rehearsal=${REHEARSAL:-0}
stages=(checks speed large settings layouts published tests)
failed=()
export TQDM_DISABLE=1 PYTHONUNBUFFERED=1
[[ "$rehearsal" == 1 ]] && export OMP_NUM_THREADS=1

for stage in "$@"; do
    if [[ " ${stages[*]} " != *" $stage "* ]]; then
        echo "error: gpu.sh $stage: not a stage; choose from ${stages[*]}" >&2
        exit 2
    fi
done
continues=$(($# == 0))
(($# > 0)) || set -- "${stages[@]}"

say() {
    [[ "$dry_run" == 1 ]] || echo "$*" | tee -a "$out/gpu.log"
}

# measure NAME SECONDS COMMAND...: run a command for at most that time and append its output to the log.
measure() {
    local name=$1 limit=$(($2 * ${SLOWER:-1})) start=$SECONDS code command
    command=(timeout --kill-after=5 "$limit" "${@:3}")
    if [[ "$dry_run" == 1 ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    if ((continues)) && grep -qs "^$name: ended with code 0 " "$out/gpu.log"; then
        say "$name: has ended with code 0 before"
        return
    fi
    say "$name: ${command[*]}"
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw,temperature.gpu --format=csv,noheader >> "$out/gpu.log" 2>&1
    "${command[@]}" 2>&1 | tee -a "$out/gpu.log"
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed+=("$name")
    say "$name: ended with code $code after $((SECONDS - start)) s of at most $limit"
}

# step NAME SECONDS SIZE MICRO_BATCH_SIZE MICRO_BATCHES FLAGS...: time optimizer steps of 131,072 tokens.
step() {
    local shape=(--model-size "$3" --seq-length 2048 --micro-batch-size "$4" --micro-batches "$5" --rounds 5)
    if [[ "$rehearsal" == 1 ]]; then
        shape=(--device cpu --num-layers 2 --hidden-size 64 --num-attention-heads 2 --vocab-size 500 --seq-length 32
            --micro-batches 2 --rounds 2)
    fi
    measure "$1" "$2" "$python" benchmarks/training_step/run.py "${shape[@]}" --steps 1 \
        --time-limit $(($2 * ${SLOWER:-1} - 10)) --no-tables --output "$out/$1.json" "${@:6}"
}

# settings NAME SECONDS SETS...: measure what settings cost; compiled code of earlier measurements is not reused.
settings() {
    local shape=(--model-size 140M)
    if [[ "$rehearsal" == 1 ]]; then
        shape=(--device cpu --model-size 7M --large-model-size 7M --memory-sizes 7M --vocab-size 500 --seq-length 32
            --micro-batch-size 1 --samples 32 --steps 1)
    fi
    measure "$1" "$2" env TORCHINDUCTOR_CACHE_DIR="$scratch/inductor-$1" "$python" benchmarks/settings/run.py \
        "${shape[@]}" --sets "${@:3}" --time-limit $(($2 * ${SLOWER:-1} - 20)) --output "$out/settings.jsonl"
}

scratch=/tmp/gpu-scratch
if [[ "$dry_run" != 1 ]]; then
    mkdir -p "$out"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    if compgen -G "$wheels/*.whl" > /dev/null; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl
        export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
    fi
fi
device=()
[[ "$rehearsal" == 1 ]] && device=(--device cpu)
for stage in "$@"; do
    case "$stage" in
        checks)
            measure checks 120 "$python" benchmarks/gpu_checks/run.py "${device[@]}" \
                --time-limit $((100 * ${SLOWER:-1})) --output "$out/checks.jsonl"
            ;;
        speed)
            step 140M 220 140M 8 8 --only "ours * compiled" "nanogpt AR compiled" "transformers AR compiled"
            step 1018M 195 1018M 8 8 --only "ours * compiled" "transformers AR compiled"
            ;;
        large)
            step 425M 130 425M 8 8 --only "ours * compiled" "transformers AR compiled"
            step 2283M 180 2283M 4 16 --only "ours * compiled" "transformers AR compiled"
            ;;
        settings) settings settings 210 settings ;;
        layouts)
            settings layouts 150 layouts
            settings fp8 90 fp8
            settings memory 60 memory
            ;;
        published)
            if [[ -d "$published" ]]; then
                step published 220 140M 4 16 --published "$published" \
                    --only "ours MDM dropout compiled" "published MDM dropout eager" "ours MDM compiled"
            else
                say "published: left out, $published is not there"
            fi
            ;;
        tests)
            workers=()
            if [[ "$dry_run" == 1 ]] || "$python" -c "import xdist" 2> /dev/null; then workers=(-n 8 --dist load); fi
            measure tests 300 "$python" -m pytest -q -rs -m gpu "${workers[@]}" tests/test_cuda.py
            ;;
    esac
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
