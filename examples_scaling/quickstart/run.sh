#!/usr/bin/env bash
# The main job: AR, MDM and regularised AR on the same 50,000 unique tokens with the same compute, then a report.
# Shows AR overfitting repeated data, and what masked diffusion and regularisation make of it. About 12 minutes on two
# CPU cores; a CUDA device is used where there is one. OUT names the folder of the runs (default runs/quickstart);
# DRY_RUN=1 prints the commands; further flags go to every training. The same command resumes.
source "$(dirname "$0")/../lib/run.sh"
export NPROC=${NPROC:-1} # so small a network gains nothing from more devices
out=${OUT:-runs/quickstart}
data=${DATA:-data/quickstart}
[[ "${DRY_RUN:-0}" == 1 ]] || bash install.sh
execute "$python" tools/preprocess_data.py --output-dir "$data" --train-tokenizer 512
shared=(--num-layers 2 --hidden-size 128 --num-attention-heads 2 --init-method-std 0.06 --seq-length 128
    --train-data-path "$data/train" --train-unique-tokens 50_000 --train-epochs 160
    --micro-batch-size 32 --global-batch-size 32 --lr 2e-3 --log-interval 20
    --valid-data-path "tuning=$data/tuning" "validation=$data/validation" --eval-samples 256 --eval-batch-size 32)
pretrain ar "${shared[@]}" --save "$out/ar" "$@"
pretrain mdm "${shared[@]}" --save "$out/mdm" "$@"
pretrain ar "${shared[@]}" --token-dropout-max 0.3 --mlp-dropout 0.2 --weight-decay 1.0 --save "$out/ar_regularised" "$@"
execute "$python" tools/report.py "$out/ar" "$out/mdm" "$out/ar_regularised" --output "$out/report"
