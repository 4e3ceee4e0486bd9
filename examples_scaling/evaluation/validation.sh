#!/usr/bin/env bash
# Validation loss of a run on 25,600 windows of C4's validation set (52.4M tokens): exact for AR, for MDM a bound with
# its standard error (mc_se) from 32 Monte-Carlo samples, as in the paper (2507.15857).
# The paper: best on 100M unique tokens are 3.71 for AR and at most 3.55 for MDM.
# Cost: 2 x 416.9e6 x 25_600 x 2_048 x 32 / (0.4 x 989e12) / 3600 = 0.98 GPU-hours of H100 (MDM 425M).
# OBJECTIVE (mdm, ar) and LOAD, a run or a checkpoint of it, choose the model; DRY_RUN=1 prints the command.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
objective=${OBJECTIVE:-mdm} samples=(--num-mc 32)
[[ "$objective" == mdm ]] || samples=()
run=${LOAD:-runs/${objective}_best_on_100m}
require_files "train it, or name another run: LOAD=runs/NAME" "$run"
pretrain "$objective" --skip-train --load "$run" --eval-samples 25_600 "${samples[@]}" "$@"
