#!/usr/bin/env bash
# Eight multiple-choice tasks, zero-shot, with likelihood bounds of the best MDM run on 100M tokens, from at most 32
# Monte-Carlo samples per choice (2507.15857). Clearly worse choices stop sampling early; --decide-at 0 takes all.
# The paper, without saying by which likelihood: ARC-Easy 37.84, BoolQ 49.38, COPA 59.00, HellaSwag 30.24, PIQA 60.72,
# RACE 28.96, WinoGrande 50.97, SciQ 68.67.
# Cost: 71_000 x 32 x 128 x 2 x 416.9e6 / (0.4 x 67e12) / 3600 = 2.5 GPU-hours of H100, in fp32 as published: 71,000
# choices of 128 tokens, assumed. LOAD names another run, TASKS others; DRY_RUN=1 prints.
source "$(dirname "$0")/../lib/run.sh"
score "${LOAD:-runs/mdm_best_on_100m}" --dtype float32 --likelihood bound --num-mc 32 --only-mc-nll \
    --output_path runs/downstream/mdm_bound.json \
    --tasks "${TASKS:-arc_easy,boolq,copa,hellaswag,piqa,race,winogrande,sciq}" "$@"
