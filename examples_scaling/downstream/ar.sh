#!/usr/bin/env bash
# Nine downstream tasks, zero-shot, with the likelihoods of the best AR run on 100M tokens (2507.15857).
# The paper: ARC-Easy 35.63, BoolQ 46.00, COPA 56.33, HellaSwag 27.37, PIQA 60.94, RACE 25.28, WinoGrande 48.87,
# SciQ 58.05, LAMBADA 10.91.
# Cost: 76_000 x 128 x 2 x 144.8e6 / (0.4 x 67e12) / 3600 = 0.03 GPU-hours of H100, in fp32 as published: 76,000 choices
# of 128 tokens, assumed. Requires: bash install.sh --with-eval. LOAD names another run, TASKS others; DRY_RUN=1 prints.
source "$(dirname "$0")/../lib/run.sh"
score "${LOAD:-runs/ar_best_on_100m}" --dtype float32 --output_path runs/downstream/ar.json \
    --tasks "${TASKS:-arc_easy,boolq,copa,hellaswag,piqa,race,winogrande,sciq,lambada_standard}" "$@"
