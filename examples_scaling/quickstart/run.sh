#!/usr/bin/env bash
# The main job: AR, MDM and regularised AR on the same 50,000 unique tokens with the same compute, then a report.
# Shows AR overfitting repeated data, and what masked diffusion and regularisation make of it; a fourth, short run gives
# AR a schedule that ends where it is best. They train side by side: about ten minutes on two CPU cores with bf16, 24 on
# two without; a CUDA device is used where there is one. OUT names the folder of the runs (default runs/quickstart);
# DRY_RUN=1 prints the commands; further flags go to every training. Ctrl-C saves and leaves, and the same command
# resumes.
source "$(dirname "$0")/../lib/run.sh"
export NPROC=${NPROC:-1} # so small a network gains nothing from more devices
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 2) / 3))}
out=${OUT:-runs/quickstart}
data=${DATA:-data/quickstart}
[[ "${DRY_RUN:-0}" == 1 ]] || bash install.sh
execute "$python" tools/preprocess_data.py --output-dir "$data" --train-tokenizer 512
shared=(--num-layers 2 --hidden-size 128 --num-attention-heads 4 --init-method-std 0.06 --seq-length 128
    --train-data-path "$data/train" --train-unique-tokens 50_000
    --micro-batch-size 16 --global-batch-size 16 --lr 2e-3 --log-interval 100
    --valid-data-path "tuning=$data/tuning" "validation=$data/validation" --eval-samples 192 --eval-batch-size 32)
long=("${shared[@]}" --train-epochs 160)
beside ar pretrain ar "${long[@]}" --eval-interval 98 --save "$out/ar" "$@"
beside mdm pretrain mdm "${long[@]}" --save "$out/mdm" "$@"
beside ar_regularised pretrain ar "${long[@]}" --eval-interval 98 --save "$out/ar_regularised" \
    --token-dropout-max 0.3 --mlp-dropout 0.2 --weight-decay 1.0 "$@"
beside ar_short pretrain ar "${shared[@]}" --train-epochs 12 --save "$out/ar_short" "$@"
together
execute "$python" tools/report.py "$out"/{ar,mdm,ar_regularised,ar_short} --output "$out/report"
