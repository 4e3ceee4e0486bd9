# shellcheck shell=bash disable=SC2034 # the scripts that source this use the variables
# Sourced: data flags of the published set of 100M C4 tokens; exits with code 2 if a file is missing.
require_files "bash download.sh fetches it" data/{train_c4_100m.txt,val_c4.txt,gpt2-vocab.json,gpt2-merges.txt}
unique_tokens=99952399
c4_100m=(--train-data-path-file data/train_c4_100m.txt --valid-data-path-file data/val_c4.txt
    --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt)
