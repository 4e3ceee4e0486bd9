#!/usr/bin/env bash
# English prose for the study, from Debian's packages of sayings: 2.5 MB, 15,000 short documents in random order. Writes data/prose.jsonl
# and data/prose in seconds; needs apt-get and dpkg. DRY_RUN=1 only prints.
#
#     bash examples_scaling/study/prose.sh
#     DATA=data/prose OUT=runs/study_prose RECORDS=results/study_prose.jsonl bash examples_scaling/study/run.sh \
#         --stages tune headline    # it has 1.1M tokens, too few for the stage `fresh`
source "$(dirname "$0")/../lib/run.sh"
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
(
    cd "$folder"
    execute apt-get download fortunes fortunes-min
    for package in *.deb; do execute dpkg -x "$package" .; done
)
[[ "${DRY_RUN:-0}" == 1 ]] || mkdir -p data
[[ "${DRY_RUN:-0}" == 1 ]] || "$python" - "$folder/usr/share/games/fortunes" data/prose.jsonl <<'PYTHON'
import json
import random
import sys
from pathlib import Path

folder, output = map(Path, sys.argv[1:])
files = sorted(path for path in folder.iterdir() if path.suffix == "")
texts = [text for path in files for text in path.read_text(encoding="utf-8").split("\n%\n") if text.strip()]
random.Random(0).shuffle(texts)
output.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
PYTHON
execute "$python" tools/preprocess_data.py --output-dir data/prose --input data/prose.jsonl --train-tokenizer 512
