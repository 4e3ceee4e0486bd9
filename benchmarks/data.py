#!/usr/bin/env python3
"""Measure what comes before a step: writing token files, starting to read them, reading; and how each grows.

    python benchmarks/data.py
    python benchmarks/data.py --documents 1000 200000 --epochs 1 500 --output data.json

Preprocessing: the source of Python's standard library, once and several times over as .jsonl, through the whole of
tools/preprocess_data.py with a trained tokenizer, beside the tokenizers library alone on the same text. Starting:
from an open data set to the first sample, by epoch order, documents and epochs, with the memory it takes. Reading:
samples by run position, as a loader's worker reads them. Program: pretrain_gpt.py up to its first step. On one thread;
times are CPU time, of the program also the wall's.
"""

import os

# before the libraries are imported: one thread
os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.contestants import version
from benchmarks.options import read_options
from megatron.config.flags import flag, require
from megatron.data.corpus import standard_library
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.preprocess import BATCH_CHARACTERS, prepare
from megatron.data.preprocess_options import PreprocessOptions
from megatron.data.samples import TrainSamples
from megatron.data.tokenizer import HFTokenizer, train_tokenizer
from megatron.training.environment import device_name

SEQ_LENGTH = 2048
MEAN_TOKENS = 500  # of a document, whose lengths are log-normal
ORDERS = ("documents", "windows", "megatron")
SAMPLES = 2000  # that are read to time reading


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    copies: tuple[int, ...] = flag((1, 2, 4), "how many times the text is preprocessed in one go", metavar="N")
    vocabulary: int = flag(8192, "ids of the tokenizer that is trained, once, before anything is timed")
    documents: tuple[int, ...] = flag((1_000, 10_000, 100_000), "documents of the data sets that are read", metavar="N")
    epochs: tuple[int, ...] = flag((1, 10, 100), "epochs that a run asks for", metavar="N")
    rounds: int = flag(3, "times that each is measured; the median is told")
    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")

    def __post_init__(self):
        for name in ("copies", "documents", "epochs"):
            require(min(getattr(self, name)) >= 1, name, " ".join(map(str, getattr(self, name))), "must be at least 1")
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")
        require(self.documents[0] * MEAN_TOKENS > 2 * SEQ_LENGTH, "documents", self.documents[0], "give at least 10")


def main() -> None:
    options = read_options(Options, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "settings": asdict(options),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "numpy", "tokenizers")},
            "machine": device_name(torch.device("cpu")),
            "date": date.today().isoformat(),
            "preprocessing": preprocessing(options, Path(folder)),
            "starting": starting(options, Path(folder)),
            "program": program(options, Path(folder)),
        }
    print_report(report)
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def seconds(work, rounds: int) -> float:
    """Return the median CPU time of `work()`."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def preprocessing(options: Options, folder: Path) -> list[dict]:
    texts = [document.text for document in standard_library()]
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(texts, options.vocabulary, str(tokenizer))
    library, found = HFTokenizer(str(tokenizer)), []
    for copies in tqdm(options.copies, "preprocessing", leave=False):
        lines = folder / "text.jsonl"
        # each copy of a text differs from the others in a line, so that none is left out as a duplicate
        copied = [f"# {copy}\n{text}" for copy in range(copies) for text in texts]
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in copied))
        turns = iter(range(options.rounds))

        def write():
            prepare(
                PreprocessOptions(
                    output_dir=folder / f"out_{copies}_{next(turns)}",
                    input=(str(lines),),
                    tokenizer_model=str(tokenizer),
                    splits=(100, 0, 0),
                )
            )

        def tokenise():
            batch, size = [], 0
            for text in copied:
                batch, size = [*batch, text], size + len(text)
                if size > BATCH_CHARACTERS:
                    library.encode_batch(batch)
                    batch, size = [], 0
            library.encode_batch(batch)

        megabytes = sum(len(text.encode()) for text in copied) / 1e6
        whole, alone = seconds(write, options.rounds), seconds(tokenise, options.rounds)
        found.append({"megabytes": megabytes, "seconds": whole, "tokenizers_seconds": alone})
    return found


def starting(options: Options, folder: Path) -> list[dict]:
    found = []
    for documents in tqdm(options.documents, "starting and reading", leave=False):
        dataset = written(documents, folder / f"documents_{documents}")
        for order, epochs in product(ORDERS, options.epochs):
            samples = epochs * dataset.total_tokens // SEQ_LENGTH

            def start() -> TrainSamples:
                train = TrainSamples(dataset, SEQ_LENGTH, 1, order)
                train.request(samples)
                train[0]
                return train

            taken = seconds(start, options.rounds)
            tracemalloc.start()
            train = start()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            places = np.linspace(0, samples - 1, SAMPLES).astype(int)  # in the order of a run: epoch after epoch
            reading = seconds(lambda: [train[int(place)] for place in places], 1) / SAMPLES
            found.append({"order": order, "documents": documents, "epochs": epochs, "samples": samples})
            found[-1] |= {"seconds": taken, "bytes": peak, "seconds_per_sample": reading}
    return found


def written(documents: int, prefix: Path) -> IndexedDataset:
    """Return a data set of random tokens."""
    random = np.random.default_rng(documents)
    lengths = np.maximum(1, random.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, documents).astype(int))
    with IndexedDatasetWriter(str(prefix), 50_257) as writer:
        for length in lengths:
            writer.add_document(random.integers(0, 50_257, length))
    return IndexedDataset(str(prefix))


def program(options: Options, folder: Path) -> dict:
    """Return the time of a training of one step, in a process of its own, and of importing torch alone."""
    data = folder / f"documents_{options.documents[0]}"
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --train-iters 1 --global-batch-size 8".split()
    flags += ["--seq-length", "64", "--tokenizer-type", "NullTokenizer", "--vocab-size", "50256"]
    script = str(Path(__file__).resolve().parents[1] / "pretrain_gpt.py")
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


def print_report(report: dict) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"{report['date']}, {report['machine']}, one thread; {versions}\n")
    print("| text, MB | seconds | MB/s | tokenizers alone, MB/s | share of it |\n|---|---|---|---|---|")
    for row in report["preprocessing"]:
        size, whole, alone = row["megabytes"], row["seconds"], row["tokenizers_seconds"]
        print(f"| {size:.1f} | {whole:.2f} | {size / whole:.2f} | {size / alone:.2f} | {alone / whole:.0%} |")
    print(
        "\n| order | documents | epochs | samples | to the first sample, ms | memory, MB | a sample, µs | Mtokens/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in report["starting"]:
        each = 1e6 * row["seconds_per_sample"]
        print(
            f"| {row['order']} | {row['documents']:,} | {row['epochs']} | {row['samples']:,} | "
            f"{1000 * row['seconds']:.1f} | {row['bytes'] / 1e6:.1f} | {each:.0f} | {SEQ_LENGTH / each:.0f} |"
        )
    print("\n| program | seconds | of CPU |\n|---|---|---|")
    for name, row in report["program"].items():
        print(f"| {name} | {row['wall']:.1f} | {row['cpu']:.1f} |")


if __name__ == "__main__":
    main()
