#!/usr/bin/env bash
# Token orders for AR, one point of the ablation in 2507.15857 (section 3.5): each sequence is read in one of ORDERS
# orders, the first left to right, the others increasingly perturbed. 278M, 100 epochs.
# The paper: more orders lower the loss, and with 16 it comes close to that of diffusion; no values are printed.
# Cost: 6 x 275.7e6 x 99.95e8 / (0.4 x 989e12) / 3600 = 11.6 GPU-hours of H100.
# ORDERS chooses the point; DRY_RUN=1 prints the command and its cost; further flags override the defaults.
# All of them: tools/sweep.py run examples_scaling/sweeps/augmentation.yaml
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
orders=${ORDERS:-16}
pretrain ar --recipe published --model-size 278M --train-epochs 100 "${c4_100m[@]}" --num-order-list "$orders" \
    --use-predefined-order --save "runs/ar_${orders}_orders" "$@"
