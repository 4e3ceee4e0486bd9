#!/usr/bin/env python3
"""Score every checkpoint of a run on downstream tasks, and draw scores against epochs.

    python tools/score_checkpoints.py runs/mdm --tasks hellaswag,piqa --limit 200 --output runs/mdm_scores

Writes DIR/scores.json and DIR/scores.png. Training with --keep-every-epochs leaves more checkpoints than the newest
two and the best. Settings of scoring are those of python -m megatron.evaluation.harness.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.main import configure_logging

# isort: split
# libgomp has been told how to wait: before that nothing may load torch
from megatron.config.flags import HelpFormatter, Parser, add_section, build
from megatron.errors import ConfigurationError
from megatron.evaluation.requests import Scoring
from megatron.evaluation.tasks import leave_without_lm_eval
from megatron.training.run_folder import write_json, writing

try:
    from megatron.evaluation.checkpoints import first_metric, plot, score_checkpoints
except ImportError as missing:
    leave_without_lm_eval(missing)


class Formatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written."""


def main() -> None:
    configure_logging()
    try:
        work(sys.argv[1:])
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


def work(arguments: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a folder that --save wrote")
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="tasks of lm-eval")
    parser.add_argument("--include_path", metavar="DIR", help="folder of further tasks")
    parser.add_argument("--limit", type=float, metavar="N", help="documents of each task, or their share")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where scores.json and .png go")
    add_section(parser, Scoring, {})
    options = parser.parse_known(arguments)
    with writing(options.output):  # before the work, not after it
        options.output.mkdir(parents=True, exist_ok=True)
    scoring, tasks = build(Scoring, options), options.tasks.split(",")
    record = score_checkpoints(options.run, tasks, scoring, options.include_path, options.limit)
    write_json(options.output / "scores.json", record)
    plot(record, options.output / "scores.png")
    for point in record["points"]:
        best = [f"{task} {each[first_metric(each)]:.4f}" for task, each in point["results"].items()]
        print(f"epoch {point['epoch']:.2f}  step {point['iteration']}  {'  '.join(best)}")


if __name__ == "__main__":
    main()
