#!/usr/bin/env bash
# One point of figure 5 of 2507.15857: equal compute on fewer unique tokens of C4, which are read for EPOCHS epochs.
# The paper: repeats are as good as fresh tokens up to about 4 epochs for AR and about 100 for MDM.
# Cost: 1e19 / (0.4 x 989e12) / 3600 = 7.0 GPU-hours of H100.
# OBJECTIVE (ar, mdm), FLOPS (1e19, 3e19, 1e20) and EPOCHS (1, 2, 4, 10, 20, 50, 100) choose the point; sizes are the
# compute-optimal ones. Whole curve: tools/sweep.py run examples_scaling/sweeps/data_value.yaml
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4.sh
objective=${OBJECTIVE:-ar} flops=${FLOPS:-1e19} epochs=${EPOCHS:-4}
point=$(published data-value "$objective" "$flops" "$epochs")
read -r size unique_tokens <<< "$point"
pretrain "$objective" --recipe published --model-size "$size" --train-flops "$flops" "${c4[@]}" \
    --train-unique-tokens "$unique_tokens" --save "runs/data_value_${objective}_${flops}_${epochs}_epochs" "$@"
