#!/usr/bin/env bash
# LAMBADA, zero-shot, with the best MDM run on 100M tokens: the last word is generated, the most confident token first,
# and counts if it matches; no likelihood is computed (2507.15857).
# The paper: 15.19 for MDM and 10.91 for AR.
# Cost: 5_153 x 2 x 128 x 2 x 416.9e6 / (0.4 x 67e12) / 3600 = 0.01 GPU-hours of H100, in fp32 as published: 5,153 words
# of two tokens, each a sequence of 128, assumed. LOAD names another run, TASKS others; DRY_RUN=1 prints.
source "$(dirname "$0")/../lib/run.sh"
score "${LOAD:-runs/mdm_best_on_100m}" --dtype float32 --only-generate \
    --output_path runs/downstream/mdm_generate.json --tasks "${TASKS:-lambada_standard}" "$@"
