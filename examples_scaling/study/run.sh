#!/usr/bin/env bash
# AR, regularised AR and masked diffusion on the same unique tokens, equally tuned: study.yaml says what, results/study.md what came
# out. Some seven hours in all on two CPU cores, 80 minutes the headline (--stages tune headline). Runs that RECORDS has (tools/sweep.py
# archive) are not trained again. Ctrl-C saves and stops; the same command resumes. Further flags go to tools/sweep.py run or submit.
#
#     bash examples_scaling/study/run.sh
#     bash examples_scaling/study/run.sh --stages tune headline
#     DATA=data/mine SWEEP=mine.yaml SITE=site.yaml bash examples_scaling/study/run.sh    # on a cluster, as SLURM job arrays
#
# SWEEP is the sweep file (default study.yaml, for another scale a changed copy); DATA the folder of train, tuning and validation
# (default data/quickstart, made from the Python standard library); OUT the folder of the sweep (default runs/study); RECORDS an archive
# (default results/study.jsonl, where it exists); SITE the file of the cluster for tools/sweep.py submit; DRY_RUN=1 only prints.
source "$(dirname "$0")/../lib/run.sh"
sweep=${SWEEP:-examples_scaling/study/study.yaml}
out=${OUT:-runs/study}
records=${RECORDS:-results/study.jsonl}
require_files "name a sweep file, such as examples_scaling/study/study.yaml" "$sweep"
[[ "${DRY_RUN:-0}" == 1 ]] || bash install.sh
if [[ -z "${DATA:-}" ]]; then
    execute "$python" tools/preprocess_data.py --output-dir data/quickstart --train-tokenizer 512
elif [[ "${DRY_RUN:-0}" != 1 ]]; then
    require_files "tools/preprocess_data.py writes it" "$DATA"/{train,tuning,validation}.idx
    mkdir -p "$(dirname "$out")"
    text=$(<"$sweep")
    text=${text//data\/quickstart/"$DATA"} # in quotes & means itself, in newer bash too
    echo "$text" > "$out.yaml"
    sweep=$out.yaml
fi
[[ ! -e "$records" ]] || execute "$python" tools/sweep.py restore "$sweep" "$records" --output "$out"
if [[ -n "${SITE:-}" ]]; then
    execute "$python" tools/sweep.py submit "$sweep" --output "$out" --site "$SITE" "$@"
else
    execute "$python" tools/sweep.py run "$sweep" --output "$out" "$@"
    execute "$python" tools/sweep.py collect "$out"
    execute "$python" tools/report.py "$out" --output "$out/report"
fi
