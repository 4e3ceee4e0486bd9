#!/usr/bin/env bash
# Exact validation loss of the run of train_ar.sh, on 25,600 windows of C4's validation set (52.4M tokens).
# Expected: 3.71 (2507.15857). LOAD names another run or checkpoint; further flags override the defaults.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
run=${LOAD:-runs/ar_best_on_100m}
require_files "bash examples_scaling/quickstart/train_ar.sh trains it" "$run"
pretrain ar --skip-train --load "$run" --eval-samples 25_600 --eval-batch-size 16 "$@"
