#!/usr/bin/env bash
# Validation bound of the run of train_mdm.sh, on 25,600 windows of C4's validation set (52.4M tokens), from 8
# Monte-Carlo samples, with their standard error (mc_se). Expected: at most 3.55 (2507.15857).
# LOAD names another run or checkpoint; further flags override the defaults.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
run=${LOAD:-runs/mdm_best_on_100m}
require_files "bash examples_scaling/quickstart/train_mdm.sh trains it" "$run"
pretrain mdm --skip-train --load "$run" --eval-samples 25_600 --num-mc 8 "$@"
