#!/usr/bin/env bash
# One point of figures 2 to 4 of 2507.15857: loss over epochs and model size on 100M unique tokens of C4.
# The paper: AR is best at 140M and 50 epochs (3.71) and overfits beyond; MDM at 425M and 500 epochs (at most 3.55).
# Cost: 6 x 217.5e6 x 99.95e8 / (0.4 x 989e12) / 3600 = 9.2 GPU-hours of H100.
# OBJECTIVE (ar, mdm), SIZE and EPOCHS choose the point; DRY_RUN=1 prints it and its cost; further flags override.
# Whole grid: tools/sweep.py run examples_scaling/sweeps/epochs_by_size.yaml
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4_100m.sh
objective=${OBJECTIVE:-ar} size=${SIZE:-217M} epochs=${EPOCHS:-100}
pretrain "$objective" --recipe published --model-size "$size" --train-epochs "$epochs" "${c4_100m[@]}" \
    --save "runs/${objective}_${size}_${epochs}_epochs" "$@"
