#!/usr/bin/env python3
"""Measure the data loader as training uses it, and opening data sets of up to a billion documents.

    python benchmarks/loader/run.py
    python benchmarks/loader/run.py --documents 208931 1000000000 --output loader.json

Loader: samples of 2048 tokens (int64) through `Loader` by epoch order, objective, micro-batch size and worker
processes, in wall-clock time from the first batch to the last; "ids" are token ids without an objective's `prepare`.
Opening: a data set of documents of about 480 tokens, from its files, which are not in the page cache, to the first
sample and to 200 random ones of 500 epochs, in a new process. Its index is written in full (20 bytes per document), its
tokens are a sparse file of zeros. Run it on a machine that does nothing else.
"""

import os

# before the libraries are imported: one thread
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import environment, markdown_table, output_flag, publish, read_options, require_positive
from megatron.batch import Batch
from megatron.config.flags import flag, require
from megatron.config.sections import ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.data.index_file import CODES, HEADER, MAGIC
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import TrainSamples
from megatron.objectives.input_noise import InputNoise
from megatron.objectives.registry import build_objective
from megatron.training.microbatches import Loader, MicroBatches

SEQ_LENGTH, GLOBAL_BATCH, VOCABULARY = 2048, 256, Vocabulary(50257)
MEAN_TOKENS = 480  # per document; document lengths are log-normal
LOADED_DOCUMENTS = 100_000  # of the data set that the loader reads
BLOCK = 1 << 20  # documents whose lengths are repeated in a large index
EPOCHS, RANDOM_SAMPLES = 500, 200
WARM_UP = 32  # micro-batches before the time starts


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    orders: tuple[str, ...] = flag(("documents", "windows"), "epoch orders of the loader", metavar="ORDER")
    micro_batch_sizes: tuple[int, ...] = flag((1, 8), "samples of a micro-batch", metavar="B")
    workers: tuple[int, ...] = flag((0, 2), "worker processes", metavar="N")
    samples: int = flag(8192, "samples that one measurement reads")
    documents: tuple[int, ...] = flag((208_931, 100_000_000), "documents of the data sets that are opened", metavar="N")
    rounds: int = flag(3, "repetitions of each measurement; the median is reported")
    output: str | None = output_flag()

    def __post_init__(self):
        for name, least in (("micro_batch_sizes", 1), ("workers", 0), ("documents", 100)):
            values = getattr(self, name)
            require(min(values) >= least, name, " ".join(map(str, values)), f"must be at least {least}")
        require_positive(self, ("samples", "rounds"))
        free, needed = shutil.disk_usage(tempfile.gettempdir()).free, 20 * max(self.documents)
        require(
            free > 1.1 * needed, "documents", max(self.documents), f"needs {needed} bytes, {free} are free; lower it"
        )


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    report = {"settings": asdict(options), "environment": environment(torch.device("cpu"), "numpy")}
    with tempfile.TemporaryDirectory() as folder:
        report["loader"] = loading(options, random_dataset(Path(folder) / "random"))
        report["opening"] = opening(options, Path(folder))
    publish(report, tables(report), options.output)


# ------------------------------------------------------------------ loader


class Ids:
    """The token ids without an objective."""

    def prepare(self, ids: np.ndarray, sample_indices: np.ndarray, seed: int) -> Batch:
        """Return a batch without scored positions."""
        return Batch.unscored(torch.from_numpy(ids), causal=True)


OBJECTIVES = {
    "ids": Ids(),
    **{name: build_objective(ObjectiveConfig(objective=name), VOCABULARY, GLOBAL_BATCH) for name in ("ar", "mdm")},
}


def loading(options: Options, dataset: IndexedDataset) -> list[dict]:
    """Return tokens per second of every combination; the rounds alternate between them."""
    cases = [*product(options.orders, OBJECTIVES, options.micro_batch_sizes, options.workers)]
    rates: list[list[float]] = [[] for _ in cases]
    for _ in range(options.rounds):
        for case_of, measured in zip(tqdm(cases, "loader", leave=False), rates):
            *case, workers = case_of
            measured.append(tokens_per_second(dataset, options.samples, *case, workers=workers))
    names = ("order", "objective", "micro_batch_size", "workers")
    return [dict(zip(names, case)) | {"tokens_per_second": measured} for case, measured in zip(cases, rates)]


def tokens_per_second(
    dataset: IndexedDataset, count: int, order: str, objective: str, micro_batch_size: int, *, workers: int
) -> float:
    """Return the tokens per second of a loader that reads `count` samples after its first micro-batches."""
    samples = TrainSamples(dataset, SEQ_LENGTH, 1234, order)
    budget = GLOBAL_BATCH * (2 + -(-(count + WARM_UP * micro_batch_size) // GLOBAL_BATCH))
    samples.request(budget)
    data = MicroBatches(
        samples,
        OBJECTIVES[objective],
        InputNoise((), None),
        seed=1234,
        first_sample=0,
        train_samples=budget,
        micro_batch_size=micro_batch_size,
        global_batch_size=GLOBAL_BATCH,
        rank=0,
        size=1,
    )
    batches = -(-count // micro_batch_size)
    with Loader(data, workers, torch.device("cpu")) as loader:
        for _ in islice(loader, WARM_UP):
            pass
        start = time.perf_counter()
        for _ in islice(loader, batches):
            pass
        return batches * micro_batch_size * SEQ_LENGTH / (time.perf_counter() - start)


def lengths(count: int) -> np.ndarray:
    """Return the lengths of `count` documents."""
    random = np.random.default_rng(count)
    return np.maximum(1, random.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, count)).astype(np.int32)


def random_dataset(prefix: Path) -> IndexedDataset:
    """Return a data set of random tokens, which is written to `prefix`."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, VOCABULARY.size) as writer:
        for length in lengths(LOADED_DOCUMENTS):
            writer.add_document(random.integers(0, VOCABULARY.size, length))
    return IndexedDataset(str(prefix), VOCABULARY.size)


# ------------------------------------------------------------------ opening


def opening(options: Options, folder: Path) -> list[dict]:
    """Return times and memory of opening and reading data sets, for all document counts and epoch orders."""
    results = []
    for documents in options.documents:
        with large_dataset(documents, folder / "large") as prefix:
            # shuffling a billion documents needs 20 GB
            for order in ("windows", "documents") if documents < 10**7 else ("windows",):
                rounds = [in_new_process(prefix, order) for _ in range(options.rounds)]
                results.append({"documents": documents, "order": order, "rounds": rounds})
    return results


@contextmanager
def large_dataset(documents: int, prefix: Path) -> Iterator[Path]:
    """Yield the prefix of a data set that is deleted afterwards."""
    paths = [Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin")]
    try:
        with open(paths[0], "wb") as index, open(paths[1], "wb") as data:
            data.truncate(write_index(index, documents))
        yield prefix
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def write_index(index: BinaryIO, documents: int) -> int:
    """Write an index block by block, lengths repeating after BLOCK documents; return the bytes of its tokens."""
    sizes = lengths(min(BLOCK, documents))
    ends = np.cumsum(sizes, dtype=np.int64) * 2
    index.write(HEADER.pack(MAGIC, 1, CODES[np.dtype(np.uint16)], documents, documents + 1))
    starts = range(0, documents, BLOCK)
    for first in tqdm(starts, "sizes", leave=False):
        index.write(sizes[: documents - first].tobytes())
    end = 0
    for first in tqdm(starts, "offsets", leave=False):
        block = (end + ends - 2 * sizes.astype(np.int64))[: documents - first]
        index.write(block.tobytes())
        end += int(ends[len(block) - 1])
    for first in tqdm(starts, "boundaries", leave=False):
        index.write(np.arange(first, min(first + BLOCK, documents), dtype=np.int64).tobytes())
    index.write(np.int64(documents).tobytes())
    return end


def in_new_process(prefix: Path, order: str) -> dict:
    """Return the figures of `opening_times`, after the files have left the page cache."""
    for suffix in (".idx", ".bin"):
        with open(f"{prefix}{suffix}", "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(opening_times, (str(prefix), order))


def opening_times(prefix: str, order: str) -> dict:
    """Return the seconds to the first sample and to RANDOM_SAMPLES of EPOCHS epochs, and the memory that they take."""
    before, start = anonymous_bytes(), time.perf_counter()
    dataset = IndexedDataset(prefix, VOCABULARY.size)
    samples = TrainSamples(dataset, SEQ_LENGTH, 1234, order)
    count = EPOCHS * dataset.total_tokens // SEQ_LENGTH
    samples.request(count)
    samples[0]
    first = time.perf_counter() - start
    indices = np.random.default_rng(0).integers(count, size=RANDOM_SAMPLES if order == "windows" else 1)
    for index in indices.tolist():
        samples[index]
    seconds = time.perf_counter() - start
    return {"first": first, "random": seconds, "bytes": anonymous_bytes() - before, "tokens": dataset.total_tokens}


def anonymous_bytes() -> int:
    """Return the resident memory of this process without mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


# ------------------------------------------------------------------ tables


def tables(report: dict) -> str:
    """Return the report as Markdown tables."""
    loaded = [
        (
            row["order"],
            row["objective"],
            row["micro_batch_size"],
            row["workers"],
            f"{median(row['tokens_per_second']) / 1e6:.1f}",
            f"{min(row['tokens_per_second']) / 1e6:.1f} - {max(row['tokens_per_second']) / 1e6:.1f}",
        )
        for row in report["loader"]
    ]
    opened = []
    for row in report["opening"]:
        first, random, size = (median(result[key] for result in row["rounds"]) for key in ("first", "random", "bytes"))
        counts = (f"{row['documents']:,}", f"{row['rounds'][0]['tokens'] / 1e9:.1f}", row["order"])
        read = f"{random:.2f}" if row["order"] == "windows" else "-"
        opened.append((*counts, f"{first:.2f}", read, f"{size / 1e6:.0f}"))
    columns = ("order", "objective", "micro-batch", "workers", "Mtokens/s", "range")
    names = ("documents", "Gtokens", "order", "first sample, s", f"and {RANDOM_SAMPLES} random ones, s", "memory, MB")
    return markdown_table(columns, loaded) + "\n" + markdown_table(names, opened)


if __name__ == "__main__":
    main()
