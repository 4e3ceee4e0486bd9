#!/usr/bin/env bash
# Learning-rate exploration of 2507.15857: peak and final learning rate, warm-up and beta2, one point.
# The authors: AR is best with the defaults (2e-4, 1%, 0.95); MDM gains slightly from a higher rate and longer warm-up.
# They publish no values; those of this script are its own.
# Cost: 6 x 144.8e6 x 49.98e8 / (0.4 x 989e12) / 3600 = 3.0 GPU-hours of H100.
# OBJECTIVE (mdm, ar), LR, WARMUP (percent of the budget) and EPOCHS choose the point; with --min-lr or --adam-beta2
# give another --save, too.
# A grid: tools/sweep.py run examples_scaling/sweeps/learning_rate.yaml
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
objective=${OBJECTIVE:-mdm} lr=${LR:-4e-4} warmup=${WARMUP:-5} epochs=${EPOCHS:-50}
warmup_samples=$(warmup_samples "$unique_tokens" "$epochs" "$warmup")
pretrain "$objective" --recipe published --model-size 140M --train-epochs "$epochs" "${c4_100m[@]}" --lr "$lr" \
    --lr-warmup-samples "$warmup_samples" --save "runs/${objective}_lr_${lr}_warmup_${warmup}_${epochs}_epochs" "$@"
