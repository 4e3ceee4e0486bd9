#!/usr/bin/env bash
# Nine downstream tasks, zero-shot, with chain-rule likelihoods of the best MDM run on 100M tokens: each token of a
# choice is predicted from those to its left (2507.15857).
# The paper, without saying by which likelihood: ARC-Easy 37.84, BoolQ 49.38, COPA 59.00, HellaSwag 30.24, PIQA 60.72,
# RACE 28.96, WinoGrande 50.97, SciQ 68.67, LAMBADA 15.19.
# Cost: 76_000 x 20 x 128 x 2 x 416.9e6 / (0.4 x 67e12) / 3600 = 1.7 GPU-hours of H100, in fp32 as published: 76,000
# choices of 20 tokens, each a sequence of 128, assumed. LOAD names another run, TASKS others; DRY_RUN=1 prints.
source "$(dirname "$0")/../lib/run.sh"
score "${LOAD:-runs/mdm_best_on_100m}" --dtype float32 --likelihood chain --output_path runs/downstream/mdm_chain.json \
    --tasks "${TASKS:-arc_easy,boolq,copa,hellaswag,piqa,race,winogrande,sciq,lambada_standard}" "$@"
