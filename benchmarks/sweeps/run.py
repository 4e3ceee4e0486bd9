#!/usr/bin/env python3
"""Measure what a large sweep costs: its plan, its status, its table, its report.

    python benchmarks/sweeps/run.py
    python benchmarks/sweeps/run.py --points 1000 --runs 100

The plan has epochs, model size, weight decay and learning rate as axes, and seeds; with --wsd shorter budgets are
branches. The finished runs are folders with the records of a run (`--records` of training and `--validations` of two
sets), but nothing is trained. Times are CPU seconds of this process, without those of `import torch`; those of the
report are of tools/report.py, user and system, with its imports.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
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
from megatron.training.command_line import parse

GRID = {
    "train-epochs": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "model-size": ["14M", "44M", "140M", "425M", "1018M"],
    "weight-decay": [0.0, 0.1, 0.3, 1.0],
    "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
}
POINTS_PER_SEED = 2 * 10 * 5 * 4 * 5  # of two variants
FLAGS = {"seq-length": 2048, "bf16": True, "micro-batch-size": 4, "global-batch-size": 256, "eval-interval": 100}
SETS = ("tuning", "validation")
DOCUMENTS = 300  # of a set
TRAINING = {"grad_norm": 2.08908247, "learning_rate": 0.00034408602, "weight_decay": 0.1, "mfu": None}
TRAINING |= {"tokens_per_second": 3887.557391024147, "memory_bytes": 425558016}
VALIDATION = {"likelihood": "exact", "bound": False, "num_mc": 1, "alignment": "fixed", "mc_se": None, "data_se": 0.04}
VALIDATION |= {"bits_per_byte": 1.0781, "tokens": 24576}
RECORDED = {"corpus_hash": "0", "vocabulary_size": 50257, "corpus_source": "benchmark", "precision": "bf16"}
RECORDED |= {"device": "none", "commit": None, "versions": {}, "branched_from": None, "shared_13grams": None}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    points: int = flag(10_000, f"points to plan, rounded up to a multiple of {POINTS_PER_SEED}")
    runs: int = flag(1000, "finished runs of status, collect and report")
    records: int = flag(1000, "training records of a finished run")
    validations: int = flag(40, "validations of a finished run on either set")
    rounds: int = flag(3, "timed rounds")
    wsd: bool = flag(True, "also plan the same points with --lr-decay-style WSD")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("points", "runs", "records", "validations", "rounds"))


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
    small = finished_sweep(folder, options)
    work["status"] = (options.runs, lambda: commands.status(small))
    work["collect"] = (options.runs, lambda: commands.collect(small))
    words = [sys.executable, "tools/report.py", str(small.output), "--output", str(folder / "report")]
    work["report"] = (options.runs, lambda: subprocess.run(words, check=True, cwd=ROOT, capture_output=True))
    clocks = {"report": children_time}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False, disable=None):
        for name, (_, command) in work.items():
            with redirect_stdout(StringIO()):
                seconds[name].append(seconds_of(command, clocks.get(name, time.process_time)))
    return [{"command": name, "runs": runs, "seconds": seconds[name]} for name, (runs, _) in work.items()]


def finished_sweep(folder: Path, options: Options) -> Namespace:
    """Return the sweep file and the folder of a sweep whose runs have finished, as the commands take them.

    Its runs are pairs of seeds.
    """
    small = Namespace(sweep=write_sweep(folder / "small.yaml", max(2, -(-options.runs // POINTS_PER_SEED)), {}))
    small.output = folder / "small"
    with redirect_stdout(StringIO()):
        commands.plan(small)
    points = read_plan(small.output)[: options.runs]
    write_plan(small.output, small.sweep.read_text(), points)
    write_runs(points, small.output, options)
    return small


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


def write_runs(points: Sequence[Point], sweep: Path, options: Options) -> None:
    """Write the folders of finished runs; all share the sums by document of their best and last validations."""
    random = np.random.default_rng(0)
    tokens = random.integers(50, 2000, size=DOCUMENTS)
    sums = {"id": np.arange(DOCUMENTS), "nats": 3.0 * tokens, "tokens": tokens, "bytes": 4.0 * tokens}
    np.savez_compressed(sweep / "sums.npz", **sums)
    for point in tqdm(points, desc="runs", leave=False, disable=None):
        write_run(point, sweep, options, random.normal(scale=0.1, size=2))


def write_run(point: Point, sweep: Path, options: Options, offsets: Iterable[float]) -> None:
    """Write the folder of a finished run, whose losses per set are lowest in the middle and higher by `offsets`."""
    run = point.folder(sweep)
    run.mkdir(parents=True)
    steps, every = options.records, max(1, options.records // options.validations)
    validated = range(every, steps + 1, every)
    best = validated[len(validated) // 2]
    lines = []
    for step in range(1, steps + 1):
        progress = {"iteration": step, "consumed_samples": point.train_samples * step // steps}
        progress |= {"consumed_tokens": 2048 * progress["consumed_samples"], "epoch": point.epochs * step / steps}
        progress |= {"flops": point.flops * step / steps, "seconds": 1.4913859399966896 * step}
        loss = 3.0 + (step / best - 1) ** 2 / 7
        lines.append({"kind": "train", **progress, "loss": loss} | TRAINING)
        for name, offset in zip(SETS, offsets) if step in validated else ():
            lines.append({"kind": "valid", "set": name, **progress, "loss": loss + offset} | VALIDATION)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {"state": "finished", "reason": "", "iteration": steps, "consumed_samples": point.train_samples}
    (run / "status.json").write_text(json.dumps(status))
    config = asdict(parse("ar", point.arguments)) | RECORDED | {"objective_name": point.variant}
    config |= {name: getattr(point, name) for name in ("parameters", "unique_tokens", "train_samples")}
    (run / "config.json").write_text(json.dumps(config, indent=1))
    for name in SETS:
        (run / "validation" / name).mkdir(parents=True)
        for step in {best, validated[-1]}:
            (run / "validation" / name / f"{step}.npz").hardlink_to(sweep / "sums.npz")


def children_time() -> float:
    """Return the CPU seconds, user and system, of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
