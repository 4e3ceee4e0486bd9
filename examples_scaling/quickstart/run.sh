#!/usr/bin/env bash
# The main job: AR, MDM and regularised AR on the same 50,000 unique tokens with the same compute, then a report.
# About 15 minutes on two CPU cores; DRY_RUN=1 prints the commands; further flags go to every training.
source "$(dirname "$0")/../lib/run.sh"
out=${OUT:-runs/quickstart}
data=data/quickstart
[[ "${DRY_RUN:-0}" == 1 ]] || bash install.sh
shared=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128
    --micro-batch-size 32 --global-batch-size 32 --lr 2e-3
    --train-data-path "$data/train" --train-unique-tokens 50000 --train-epochs 80
    --valid-data-path "tuning=$data/tuning" "validation=$data/validation" --eval-samples 128 --eval-interval 100)
execute "$python" tools/preprocess_data.py --output-dir "$data" --train-tokenizer 512
pretrain ar "${shared[@]}" --save "$out/ar" "$@"
pretrain mdm "${shared[@]}" --save "$out/mdm" "$@"
pretrain ar "${shared[@]}" --token-dropout-max 0.3 --mlp-dropout 0.2 --weight-decay 1.0 --save "$out/ar_regularised" "$@"
execute "$python" tools/report.py "$out/ar" "$out/mdm" "$out/ar_regularised" --output "$out/report"
