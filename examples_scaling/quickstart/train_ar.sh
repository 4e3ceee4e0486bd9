#!/usr/bin/env bash
# The best published AR run on 100M unique tokens of C4: 140M parameters, 50 epochs, validation loss 3.71 (2507.15857).
# 5.0e9 tokens, 4.3e18 FLOPs: half an hour of 8 x H100 at 40% of their peak, by arithmetic; not timed yet.
# Before: bash install.sh, bash download.sh; after: eval_ar.sh. Runs on every GPU of the node, and started again it
# resumes. DRY_RUN=1 prints the command; flags at its end win.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
pretrain ar --recipe published --model-size 140M --train-epochs 50 "${c4_100m[@]}" --save runs/ar_best_on_100m "$@"
