#!/usr/bin/env bash
# The best published AR run on 100M unique tokens of C4: 140M parameters, 50 epochs, validation loss 3.71 (2507.15857).
# 5.0e9 tokens, 4.3e18 FLOPs: half an hour on 8 H100s at 40% MFU, estimated; not measured yet.
# Before: install.sh, download.sh; after: eval_ar.sh. Uses a power of two of the node's GPUs; the same command resumes.
# DRY_RUN=1 prints the command; further flags override the defaults.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
pretrain ar --recipe published --model-size 140M --train-epochs 50 "${c4_100m[@]}" --save runs/ar_best_on_100m "$@"
