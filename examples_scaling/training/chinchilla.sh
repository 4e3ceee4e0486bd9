#!/usr/bin/env bash
# One point of the single-epoch fits of 2507.15857 (section 2.4): loss over size at equal compute, tokens read once.
# The paper: best at 1e19, 3e19 and 1e20 FLOPs are 217M, 425M and 724M for AR, 117M, 217M and 425M for MDM.
# Cost: 1e19 / (0.4 x 989e12) / 3600 = 7.0 GPU-hours of H100; the paper's budgets are 6e18, 1e19, 3e19 and 1e20.
# OBJECTIVE (ar, mdm), FLOPS and SIZE (default: the best) choose the point; DRY_RUN=1 prints the command and its cost.
# Whole grid: tools/sweep.py run examples_scaling/sweeps/chinchilla.yaml
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4.sh
objective=${OBJECTIVE:-ar} flops=${FLOPS:-1e19}
size=${SIZE:-$(published size "$objective" "$flops")}
pretrain "$objective" --recipe published --model-size "$size" --train-flops "$flops" --micro-batch-size 16 "${c4[@]}" \
    --save "runs/chinchilla_${objective}_${size}_$flops" "$@"
