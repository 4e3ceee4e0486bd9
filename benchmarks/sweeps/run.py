#!/usr/bin/env python3
"""Measure what a large sweep costs: its plan, its status, its table.

    python benchmarks/sweeps/run.py
    python benchmarks/sweeps/run.py --points 1000 --runs 100

The plan has epochs, model size, weight decay and learning rate as axes, and seeds; with --wsd shorter budgets are
branches. The finished runs are folders with the records of a run (`--records`, one in ten a validation), but nothing is
trained. Times are CPU seconds of this process, without those of `import torch`.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from tqdm import tqdm

from benchmarks.harness import (
    environment,
    markdown_table,
    output_flag,
    publish,
    read_options,
    refuse,
    require_positive,
    seconds_of,
    spread,
)
from megatron.config.flags import flag
from megatron.errors import ConfigurationError
from megatron.sweeps import commands
from megatron.sweeps.points import Point, read_plan, write_plan

GRID = {
    "train-epochs": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "model-size": ["14M", "44M", "140M", "425M", "1018M"],
    "weight-decay": [0.0, 0.1, 0.3, 1.0],
    "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
}
POINTS_PER_SEED = 2 * 10 * 5 * 4 * 5  # of two variants
FLAGS = {"seq-length": 2048, "bf16": True, "micro-batch-size": 4, "global-batch-size": 256, "eval-interval": 100}
VALIDATION = {"kind": "valid", "set": "validation", "likelihood": "exact", "bound": False, "num_mc": 1}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    points: int = flag(10_000, f"points to plan, rounded up to a multiple of {POINTS_PER_SEED}")
    runs: int = flag(1000, "finished runs of status and collect")
    records: int = flag(200, "records of a finished run")
    rounds: int = flag(3, "timed rounds")
    wsd: bool = flag(True, "also plan the same points with --lr-decay-style WSD")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("points", "runs", "records", "rounds"))


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(options, Path(folder))
    except ConfigurationError as error:
        refuse(error)
    report = {"settings": asdict(options), "environment": environment(torch.device("cpu")), "rows": rows}
    table = [(row["command"], f"{row['runs']:,}", *spread(row["seconds"], ".1f")) for row in rows]
    publish(report, markdown_table(("command", "runs", "seconds", "range"), table), options.output)


def measure(options: Options, folder: Path) -> list[dict]:
    """Return the times of each command by round."""
    schedules = {"plan": {}, "plan, WSD": {"lr-decay-style": "WSD", "lr-warmup-samples": 2560}}
    if not options.wsd:
        del schedules["plan, WSD"]
    work: dict[str, tuple[int, Callable[[], object]]] = {}
    for name, flags in schedules.items():
        sweep = write_sweep(folder / f"{len(work)}.yaml", -(-options.points // POINTS_PER_SEED), flags)
        planning = Namespace(sweep=sweep, output=folder / sweep.stem)
        work[name] = (options.points, lambda planning=planning: commands.plan(planning))
    small = Namespace(sweep=write_sweep(folder / "small.yaml", -(-options.runs // POINTS_PER_SEED), {}), output=None)
    small.output = folder / "small"
    with redirect_stdout(StringIO()):
        commands.plan(small)
    points = read_plan(small.output)[: options.runs]
    write_plan(small.output, small.sweep.read_text(), points)
    for point in tqdm(points, desc="runs", leave=False, disable=None):
        finish(point, small.output, options.records)
    work["status"] = (options.runs, lambda: commands.status(small))
    work["collect"] = (options.runs, lambda: commands.collect(small))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False, disable=None):
        for name, (_, command) in work.items():
            with redirect_stdout(StringIO()):
                seconds[name].append(seconds_of(command))
    return [{"command": name, "runs": runs, "seconds": seconds[name]} for name, (runs, _) in work.items()]


def write_sweep(path: Path, seeds: int, flags: dict) -> Path:
    """Write a sweep over GRID with two variants and return its path."""
    content = {
        "flags": FLAGS | flags | {"train-data-path": "data/elsewhere/train"},
        "parameters": GRID,
        "variants": {"ar": {"flags": {"objective": "ar"}}, "mdm": {"flags": {"objective": "mdm"}}},
        "seeds": list(range(seeds)),
        "data": {"unique_tokens": 99_952_399, "vocabulary_size": 50257},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def finish(point: Point, sweep: Path, count: int) -> None:
    """Write the folder of a finished run with `count` records."""
    run = point.folder(sweep)
    run.mkdir(parents=True)
    records = []
    for step in range(1, count + 1):
        progress = {"iteration": step, "consumed_samples": 256 * step, "consumed_tokens": 2048 * 256 * step}
        progress |= {"epoch": step / count, "flops": 1e15 * step, "seconds": 1.5 * step, "loss": 3.0 + 1 / step}
        records.append({"kind": "train", "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1e5} | progress)
        if step % 10 == 0:
            records[-1] = VALIDATION | progress
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "config.json").write_text(json.dumps({"branched_from": None}))
    status = {"state": "finished", "reason": "", "iteration": count, "consumed_samples": 256 * count}
    (run / "status.json").write_text(json.dumps(status))


if __name__ == "__main__":
    main()
