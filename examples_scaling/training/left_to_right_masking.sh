#!/usr/bin/env bash
# Left-to-right masking in MDM, an experiment of the system of 2507.15857: in a share of the sequences the masked tokens
# are a suffix instead of random positions.
# No result, model size or number of epochs is published; here 140M and 50 epochs, as in the ablations of AR.
# Cost: 6 x 144.8e6 x 49.98e8 / (0.4 x 989e12) / 3600 = 3.0 GPU-hours of H100.
# RATIO chooses the point; DRY_RUN=1 prints the command and its cost; further flags override the defaults.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
ratio=${RATIO:-0.5}
pretrain mdm --recipe published --model-size 140M --train-epochs 50 "${c4_100m[@]}" --ar-ratio "$ratio" \
    --save "runs/mdm_left_to_right_$ratio" "$@"
