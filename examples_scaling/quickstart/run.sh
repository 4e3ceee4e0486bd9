#!/usr/bin/env bash
# Quickstart: AR, MDM and regularised AR on the same 50,000 unique tokens with the same compute, then a report.
# Shows that AR overfits repeated data, and how masked diffusion and regularisation compare; a fourth, short run trains
# AR for 12 epochs, so that its learning rate decays near its best epoch. The runs train in parallel: about ten minutes
# on two CPU cores with bf16, 24 without; a CUDA device is used if there is one. OUT is the folder of the runs (default
# runs/quickstart), DATA that of the data (default data/quickstart); DRY_RUN=1 prints the commands; further flags go to
# every run. Ctrl-C saves and exits, and the same command resumes.
source "$(dirname "$0")/../lib/run.sh"
export NPROC=${NPROC:-1} # a model this small gains nothing from more devices
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 2) / 3))}
out=${OUT:-runs/quickstart}
data=${DATA:-data/quickstart}
[[ "${DRY_RUN:-0}" == 1 ]] || bash install.sh
execute "$python" tools/preprocess_data.py --output-dir "$data" --train-tokenizer 512
shared=(--num-layers 2 --hidden-size 128 --num-attention-heads 4 --init-method-std 0.06 --seq-length 128
    --train-data-path "$data/train" --train-unique-tokens 50_000
    --micro-batch-size 16 --global-batch-size 16 --log-interval 100
    --valid-data-path "tuning=$data/tuning" "validation=$data/validation" --eval-samples 192 --eval-batch-size 32)
long=("${shared[@]}" --train-epochs 160)
in_background ar pretrain ar "${long[@]}" --lr 2e-3 --eval-interval 98 --save "$out/ar" "$@"
in_background mdm pretrain mdm "${long[@]}" --lr 2e-3 --save "$out/mdm" "$@"
in_background ar_regularised pretrain ar "${long[@]}" --eval-interval 98 --save "$out/ar_regularised" \
    --recipe data-constrained "$@"
in_background ar_short pretrain ar "${shared[@]}" --lr 2e-3 --train-epochs 12 --save "$out/ar_short" "$@"
wait_all
execute "$python" tools/report.py "$out"/{ar,mdm,ar_regularised,ar_short} --output "$out/report"
