#!/usr/bin/env bash
# Validation bound of what train_mdm.sh trained, on 25,600 windows of C4's validation set (52.4M tokens), from 8 noise
# replicates, with the standard error over them (mc_se). Expected: at most 3.55 (2507.15857).
# LOAD names another run, or one of its checkpoints; flags at the end win.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
run=${LOAD:-runs/mdm_best_on_100m}
need "bash examples_scaling/quickstart/train_mdm.sh trains it" "$run"
pretrain mdm --skip-train --load "$run" --eval-samples 25_600 --num-mc 8 "$@"
