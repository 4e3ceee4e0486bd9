#!/usr/bin/env bash
# Token masking for AR, one point of the ablation in 2507.15857 (section 3.5): a share of the positions sees only a
# random part of its context; the targets stay. 140M, 50 epochs.
# The paper: ratios of 0.25, 0.5 and 0.75 do not improve the best validation loss.
# Cost: 6 x 144.8e6 x 49.98e8 / (0.4 x 989e12) / 3600 = 3.0 GPU-hours of H100.
# RATIO chooses the point; DRY_RUN=1 prints the command and its cost; further flags override the defaults.
# All of them: tools/sweep.py run examples_scaling/sweeps/augmentation.yaml
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
ratio=${RATIO:-0.25}
pretrain ar --recipe published --model-size 140M --train-epochs 50 "${c4_100m[@]}" --randmask-ratio "$ratio" \
    --save "runs/ar_token_masking_$ratio" "$@"
