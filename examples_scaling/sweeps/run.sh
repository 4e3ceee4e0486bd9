#!/usr/bin/env bash
# The sweep of epochs.yaml, about four minutes on this machine: data, all runs, one table and a page. Ctrl-C saves and stops it;
# the same command resumes. OUT is the folder of the sweep (default runs/epochs); DRY_RUN=1 only prints.
source "$(dirname "$0")/../lib/run.sh"
out=${OUT:-runs/epochs}
[[ "${DRY_RUN:-0}" == 1 ]] || bash install.sh
execute "$python" tools/preprocess_data.py --output-dir data/quickstart --train-tokenizer 512
execute "$python" tools/sweep.py run examples_scaling/sweeps/epochs.yaml --output "$out" "$@"
execute "$python" tools/sweep.py collect "$out"
