#!/usr/bin/env bash
# The best published MDM run on 100M unique tokens of C4: 425M parameters, 500 epochs, validation loss at most 3.55
# (2507.15857). 5.0e10 tokens, 1.25e20 FLOPs: eleven hours on 8 H100s at 40% MFU, estimated; not measured yet.
# Before: install.sh, download.sh; after: eval_mdm.sh. Uses a power of two of the node's GPUs; the same command resumes.
# DRY_RUN=1 prints the command; further flags override the defaults.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
pretrain mdm --recipe published --model-size 425M --train-epochs 500 "${c4_100m[@]}" --save runs/mdm_best_on_100m "$@"
