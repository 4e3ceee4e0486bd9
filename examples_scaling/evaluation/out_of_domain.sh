#!/usr/bin/env bash
# Loss of a run on texts of other domains: OSCAR, TinyStories, WikiText and IndustryCorpus2 (2507.15857).
# The paper, AR and MDM (bounds) after 100M tokens of C4: OSCAR 3.98 and 3.83, TinyStories 2.96 and 2.93, WikiText about
# 4.95 and 4.51, IndustryCorpus2 3.58 and 3.44. It does not say which documents it read.
# Cost: 4 x 2 x 416.9e6 x 2_560 x 2_048 x 32 / (0.4 x 989e12) / 3600 = 0.39 GPU-hours of H100 (MDM 425M).
# OBJECTIVE (mdm, ar) and LOAD choose the model; docs/experiments.md has the commands that prepare the texts.
source "$(dirname "$0")/../lib/run.sh"
objective=${OBJECTIVE:-mdm} samples=(--num-mc 32)
[[ "$objective" == mdm ]] || samples=()
run=${LOAD:-runs/${objective}_best_on_100m}
require_files "train it, or name another run: LOAD=runs/NAME" "$run"
require_files "docs/experiments.md has the commands" data/{oscar,tinystories,wikitext,industrycorpus2}/validation.bin
pretrain "$objective" --skip-train --load "$run" --eval-samples 2_560 "${samples[@]}" --valid-data-path \
    {oscar=data/oscar,tinystories=data/tinystories,wikitext=data/wikitext,industry=data/industrycorpus2}/validation "$@"
