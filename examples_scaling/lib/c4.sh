# shellcheck shell=bash disable=SC2034 # the scripts that source this use the variables
# Sourced: data flags of C4, of which --train-unique-tokens takes a subset; exits with code 2 if a file is missing.
require_files "bash download.sh fetches it" data/{val_c4.txt,gpt2-vocab.json,gpt2-merges.txt}
require_files "docs/experiments.md#c4 has the command that writes it" data/c4/train.{bin,idx}
c4=(--train-data-path data/c4/train --valid-data-path-file data/val_c4.txt
    --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt)
