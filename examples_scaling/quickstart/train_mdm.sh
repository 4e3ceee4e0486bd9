#!/usr/bin/env bash
# The best published MDM run on 100M unique tokens of C4: 425M parameters, 500 epochs, validation loss at most 3.55
# (2507.15857). 5.0e10 tokens, 1.25e20 FLOPs: eleven hours of 8 x H100 at 40% of their peak, by arithmetic; not timed yet.
# Before: bash install.sh, bash download.sh; after: eval_mdm.sh. Runs on every GPU of the node, and started again it
# resumes. DRY_RUN=1 prints the command; flags at its end win.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
pretrain mdm --recipe published --model-size 425M --train-epochs 500 "${c4_100m[@]}" --save runs/mdm_best_on_100m "$@"
