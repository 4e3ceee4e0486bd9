#!/usr/bin/env python3
"""Compare scoring with the published MDM estimator and, for AR, with lm-eval's transformers model.

    python benchmarks/scoring/run.py --output scoring.json

Without --mdm and --ar two small models are trained first, on the source of Python's standard library, with the usual
commands. Three tables:

1. the variance of the bound and of the published estimator (times u + k / K mod 1, tokens masked independently, NLL
   divided by time), with the same number of Monte-Carlo samples;
2. cost and best choice of multiple-choice documents with four choices, against 32 samples of the published estimator
   and 1,024 of ours;
3. requests per second of the AR model under lm-eval, ours and transformers', with the same weights and requests, in
   alternating rounds of CPU time.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness import ROOT, environment, markdown_table, publish, read_options, spread
from benchmarks.scoring import lm_eval_speed
from benchmarks.scoring.choices import questions
from benchmarks.scoring.options import Options
from benchmarks.scoring.variance import variances
from megatron.training.load_run import open_trained


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    torch.set_num_threads(1)
    mdm = open_trained(options.mdm or train(options, "mdm"))
    report = {
        "environment": environment(torch.device("cpu"), "lm_eval", "transformers"),
        "settings": vars(options),
        "mdm": {"parameters": mdm.recorded["parameters"], "iteration": mdm.meta["iteration"]},
        "variance": variances(options, mdm),
        "questions": questions(options, mdm),
        "race": lm_eval_speed.compare(options, open_trained(options.ar or train(options, "ar"))),
    }
    publish(report, tables(report), options.output)


def train(options: Options, objective: str) -> str:
    """Train a run if it does not exist yet, and return its folder."""
    folder = Path(options.folder)
    run = folder / objective
    _command("tools/preprocess_data.py", ["--output-dir", folder / "data", "--train-tokenizer", 512])
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 128 --fp32 --no-compile --lr 4e-3 "
    flags += f"--micro-batch-size 16 --global-batch-size 16 --train-iters {options.train_iters} --eval-samples 32"
    data = ["--train-data-path", folder / "data" / "train", "--valid-data-path", folder / "data" / "validation"]
    entry = {"ar": "pretrain_gpt.py", "mdm": "pretrain_mdm.py"}[objective]
    _command(entry, [*flags.split(), *data, "--save", run])
    return str(run)


def _command(program: str, arguments: list) -> None:
    done = subprocess.run([sys.executable, ROOT / program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} failed: {done.stderr[-1000:]}")


def tables(report: dict) -> str:
    """Return the report as Markdown tables."""
    variance_rows = []
    for row in report["variance"]:
        ratio = "exact" if row["times"] is None else f"{row['times']:.0f}"
        variances = (f"{row['published_variance']:.3g}", f"{row['variance']:.3g}")
        variance_rows.append((row["tokens"], *variances, ratio, f"{row['reported_variance']:.3g}"))
    results = report["questions"]
    choice_rows = []
    for name in ("published", "ours"):
        row = results[name]
        same_best = f"{row['same_best']:g} of {results['questions']}"
        choice_rows.append((name, f"{row['tokens_per_request']:,.0f}", f"{row['error']:.2f}", same_best))
    race = report["race"]
    speed_rows = [(name, f"{speed:.0f}") for name, speed in race["requests_per_second"].items()]
    columns = ("four choices", "forward tokens per request", "error, nats", "same best choice as 1,024 samples")
    tables = (
        (("target tokens", "published variance, nats²", "ours", "ratio", "ours as reported"), variance_rows),
        (columns, choice_rows),
        (("AR under lm-eval", "requests/s"), speed_rows),
    )
    speedup, spread_of_speedup = spread(race["speedup"])
    return (
        "\n".join(markdown_table(columns, rows) for columns, rows in tables)
        + f"\nspeedup over transformers {speedup} ({spread_of_speedup}); "
        + f"largest difference of a log-likelihood {race['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
