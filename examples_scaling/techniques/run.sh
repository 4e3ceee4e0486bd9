#!/usr/bin/env bash
# A sweep of this folder on two CPU cores: data, all runs, one table. Each file says what it shows and how long it takes:
#
#     NAME=loops bash examples_scaling/techniques/run.sh
#
# NAME is that of a file (default loops). Ctrl-C saves and stops the sweep; the same command resumes. OUT is its folder (default
# runs/NAME); DRY_RUN=1 only prints.
source "$(dirname "$0")/../lib/run.sh"
name=${NAME:-loops}
file=examples_scaling/techniques/$name.yaml
require_files "give the NAME of a file in examples_scaling/techniques" "$file"
out=${OUT:-runs/$name}
[[ "${DRY_RUN:-0}" == 1 ]] || bash install.sh
execute "$python" tools/preprocess_data.py --output-dir data/quickstart --train-tokenizer 512
execute "$python" tools/sweep.py run "$file" --output "$out" "$@"
execute "$python" tools/sweep.py collect "$out"
