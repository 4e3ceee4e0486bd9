#!/usr/bin/env python3
"""Measure the data pipeline: opening a data set for training, reading samples; and how each scales.

    python benchmarks/data/run.py
    python benchmarks/data/run.py --documents 1000 200000 --epochs 1 500 --output data.json

Starting: from an open data set to the first sample, by epoch order, documents and epochs, with the memory it takes.
Reading: samples by sample index, as a data loader worker reads them. Program: pretrain_gpt.py up to its first step. On
one thread; times are CPU time, and for the program also wall-clock time.
"""

import os

# before the libraries are imported: one thread
os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import (
    ROOT,
    environment,
    markdown_table,
    output_flag,
    publish,
    read_options,
    require_positive,
    seconds_of,
)
from megatron.config.flags import flag, require
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import TrainSamples

SEQ_LENGTH = 2048
MEAN_TOKENS = 500  # per document; document lengths are log-normal
ORDERS = ("documents", "windows", "megatron")
SAMPLES = 2000  # samples read to time reading


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    documents: tuple[int, ...] = flag((1_000, 10_000, 100_000), "documents of the data sets to read", metavar="N")
    epochs: tuple[int, ...] = flag((1, 10, 100), "epochs that a run trains for", metavar="N")
    rounds: int = flag(3, "repetitions of each measurement; the median is reported")
    output: str | None = output_flag()

    def __post_init__(self):
        for name in ("documents", "epochs"):
            require(min(getattr(self, name)) >= 1, name, " ".join(map(str, getattr(self, name))), "must be at least 1")
        require_positive(self, ("rounds",))
        require(self.documents[0] * MEAN_TOKENS > 2 * SEQ_LENGTH, "documents", self.documents[0], "give at least 10")


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "settings": asdict(options),
            "environment": environment(torch.device("cpu"), "numpy"),
            "starting": starting(options, Path(folder)),
            "program": program(options, Path(folder)),
        }
    publish(report, tables(report), options.output)


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median CPU time of `work()`."""
    return median(seconds_of(work) for _ in range(rounds))


def starting(options: Options, folder: Path) -> list[dict]:
    """Return times and memory of starting and reading, for all epoch orders, document counts and epochs."""
    results = []
    for documents in tqdm(options.documents, "starting and reading", leave=False):
        dataset = random_dataset(documents, folder / f"documents_{documents}")
        for order, epochs in product(ORDERS, options.epochs):
            samples = epochs * dataset.total_tokens // SEQ_LENGTH
            result = {"order": order, "documents": documents, "epochs": epochs, "samples": samples}
            results.append(result | _reading_times(dataset, order, samples, options.rounds))
    return results


def _reading_times(dataset: IndexedDataset, order: str, samples: int, rounds: int) -> dict:
    def start() -> TrainSamples:
        train_samples = TrainSamples(dataset, SEQ_LENGTH, 1, order)
        train_samples.request(samples)
        train_samples[0]
        return train_samples

    start_seconds = median_seconds(start, rounds)
    tracemalloc.start()
    train_samples = start()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sample_indices = np.linspace(0, samples - 1, SAMPLES).astype(int)  # in the order of a run: epoch after epoch
    reading_seconds = median_seconds(lambda: [train_samples[int(index)] for index in sample_indices], 1)
    return {"seconds": start_seconds, "bytes": peak_bytes, "seconds_per_sample": reading_seconds / SAMPLES}


def random_dataset(documents: int, prefix: Path) -> IndexedDataset:
    """Return a data set of random tokens, which is written to `prefix`."""
    random = np.random.default_rng(documents)
    lengths = np.maximum(1, random.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, documents).astype(int))
    with IndexedDatasetWriter(str(prefix), 50_257) as writer:
        for length in lengths:
            writer.add_document(random.integers(0, 50_257, length))
    return IndexedDataset(str(prefix))


def program(options: Options, folder: Path) -> dict:
    """Return the times of a training run of one step and of importing torch alone, each in a new process."""
    data = folder / f"documents_{options.documents[0]}"
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --train-iters 1 --global-batch-size 8".split()
    flags += ["--seq-length", "64", "--tokenizer-type", "NullTokenizer", "--vocab-size", "50256"]
    script = str(ROOT / "pretrain_gpt.py")
    commands = {
        "pretrain_gpt.py": [script, "--train-data-path", str(data), *flags],
        "import torch": ["-c", "import torch"],
    }
    return {name: _process([sys.executable, *command], options.rounds) for name, command in commands.items()}


def _process(command: list[str], rounds: int) -> dict:
    wall, cpu = [], []
    for _ in range(rounds):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall": median(wall), "cpu": median(cpu)}


def tables(report: dict) -> str:
    """Return the report as Markdown tables."""
    sample_rows = []
    for row in report["starting"]:
        counts = (f"{row['documents']:,}", row["epochs"], f"{row['samples']:,}")
        start = (f"{1000 * row['seconds']:.1f}", f"{row['bytes'] / 1e6:.1f}")
        microseconds = 1e6 * row["seconds_per_sample"]
        sample_rows.append((row["order"], *counts, *start, f"{microseconds:.0f}", f"{SEQ_LENGTH / microseconds:.0f}"))
    program_rows = [(name, f"{row['wall']:.1f}", f"{row['cpu']:.1f}") for name, row in report["program"].items()]
    tables = (
        (
            ("order", "documents", "epochs", "samples", "first sample, ms", "memory, MB", "µs per sample", "Mtokens/s"),
            sample_rows,
        ),
        (("program", "wall-clock seconds", "CPU seconds"), program_rows),
    )
    return "\n".join(markdown_table(columns, rows) for columns, rows in tables)


if __name__ == "__main__":
    main()
