#!/usr/bin/env python3
"""Score every checkpoint of a run on downstream tasks, and plot the scores against epochs, or steps of imported runs.

    python tools/score_checkpoints.py runs/mdm --tasks hellaswag,piqa --limit 200 --output runs/mdm_scores
    python tools/score_checkpoints.py runs/block --tasks piqa --likelihood chain --output runs/block_scores
    torchrun --standalone --nproc-per-node 8 tools/score_checkpoints.py runs/mdm --tasks piqa --output runs/mdm_scores

Writes DIR/scores.json and DIR/scores.png; damaged checkpoints are logged and left out. Answers are written to
DIR/answers_* as they are computed, so that the same command resumes where it was stopped. Training with
--keep-every-epochs keeps more checkpoints than the newest two and the best. The settings of scoring are those of
python -m megatron.scoring.lm_eval_cli.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.training.launcher import launch

# isort: split
# OMP_WAIT_POLICY is set by the import above and must precede torch
from megatron.config.flags import DescribedFormatter, Parser, add_section, build
from megatron.config.sections import Config
from megatron.parallel.mesh import initialize_parallel
from megatron.reporting.plots import metrics, plot_task_scores
from megatron.scoring.lm_eval_errors import leave_without_lm_eval
from megatron.scoring.published_flags import translate_published
from megatron.scoring.requests import Scoring
from megatron.training.load_run import trained_config
from megatron.training.run_folder import write_json, writing

try:
    from megatron.scoring.checkpoints import score_checkpoints
except ImportError as missing:
    leave_without_lm_eval(missing)


def main() -> None:
    """Run the command."""
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a folder that --save wrote")
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="tasks of lm-eval")
    parser.add_argument("--include_path", metavar="DIR", help="folder of additional tasks")
    parser.add_argument("--limit", type=float, metavar="N", help="documents of each task, or a fraction of them")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of scores.json and scores.png"
    )
    add_section(parser, Scoring, {})
    options = argparse.Namespace()

    def read() -> Config:
        vars(options).update(vars(parser.parse_known(translate_published(sys.argv[1:]))))
        options.scoring = build(Scoring, options)
        with writing(options.output):  # fail before scoring, not after it
            options.output.mkdir(parents=True, exist_ok=True)
        return trained_config(options.run)

    def work(config: Config, detector) -> None:
        if detector:
            initialize_parallel(minutes=config.parallel.distributed_timeout_minutes)
        tasks = options.tasks.split(",")
        settings = {"include_path": options.include_path, "limit": options.limit, "cache": options.output / "answers"}
        record = score_checkpoints(options.run, tasks, options.scoring, **settings)
        if not record["points"]:
            return  # rank 0 has them
        write_json(options.output / "scores.json", record)
        plot_task_scores(record, options.output / "scores.png")
        for point in record["points"]:
            first = {task: results[name] for task, results in point["results"].items() for name in metrics(results)[:1]}
            scores = [f"{task} {value:.4f}" for task, value in first.items()]
            epoch = [] if point["epoch"] is None else [f"epoch {point['epoch']:.2f}"]
            print("  ".join([*epoch, f"step {point['iteration']}", *scores]))

    launch(read, work)


if __name__ == "__main__":
    stop_signals.run_tool(main)
