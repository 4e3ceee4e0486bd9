#!/usr/bin/env bash
# Attention dropout as data augmentation for AR, one point of the ablation in 2507.15857 (section 3.5): 140M, 50 epochs.
# The paper: 0.25, 0.5 and 0.75 do not improve the best validation loss; all of its other runs have 0.1.
# Cost: 6 x 144.8e6 x 49.98e8 / (0.4 x 989e12) / 3600 = 3.0 GPU-hours of H100.
# DROPOUT chooses the point; DRY_RUN=1 prints the command and its cost; further flags override the defaults.
# All of them: tools/sweep.py run examples_scaling/sweeps/augmentation.yaml
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
dropout=${DROPOUT:-0.25}
pretrain ar --recipe published --model-size 140M --train-epochs 50 "${c4_100m[@]}" --attention-dropout "$dropout" \
    --save "runs/ar_attention_dropout_$dropout" "$@"
