#!/usr/bin/env bash
# 2.3B parameters, 363 epochs of 500M unique tokens, several nodes, optimizer states in host memory (2507.15857).
# The paper: MDM beats AR on 7 of 9 downstream tasks (SciQ 79.1 to 67.8); it had not converged after 130 epochs.
# Cost: 6 x 2165e6 x 1.814e11 / (0.4 x 989e12) / 3600 = 1655 GPU-hours of H100.
# Started once on each node: srun --ntasks-per-node 1 bash examples_scaling/training/multi_node.sh
# or on each of NNODES (default 2) nodes with RDZV_ENDPOINT=HOST:PORT. OBJECTIVE: ar or mdm (default); DRY_RUN=1 prints.
source "$(dirname "$0")/../lib/run.sh"
source examples_scaling/lib/c4.sh
export NNODES=${NNODES:-${SLURM_NNODES:-2}}
objective=${OBJECTIVE:-mdm} unique_tokens=499791318
command_prefix="exec" pretrain "$objective" --recipe published --model-size 2298M --train-epochs 363 \
    --train-unique-tokens "$unique_tokens" "${c4[@]}" --micro-batch-size 2 --zero-stage 1 --cpu-offload \
    --save "runs/${objective}_2298M_363_epochs" "$@"
