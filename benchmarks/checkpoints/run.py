#!/usr/bin/env python3
"""Measure how long training stalls for a checkpoint, compared with a plain copy of the same bytes.

    python benchmarks/checkpoints/run.py
    python benchmarks/checkpoints/run.py --model-size 35M --rounds 3 --output stall.json

A model of the ladder in fp32 with two Adam moments, world size 1, on the CPU. Every round times `copy_` of all tensors
into preallocated memory, `clone` of all tensors, the call that saves (the stall), and the asynchronous write that
follows. Until the file is complete the main thread polls the clock: the longest time between two polls is the longest
pause that the writer thread causes.
"""

import os

# before torch is imported: one thread, no accelerator
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.harness import (
    environment,
    markdown_table,
    output_flag,
    publish,
    ratios,
    read_options,
    refuse,
    require_positive,
    seconds_of,
    spread,
    summary,
)
from megatron.config.flags import flag
from megatron.config.sections import OptimizerConfig, ParallelConfig
from megatron.config.sizes import GPT2_VOCABULARY, ladder_model
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training.checkpoint_store import CheckpointStore
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.saver import Saver

OPERATIONS = {
    "stall": "stall: the call that saves",
    "copy": "`copy_` into preallocated memory",
    "clone": "`clone`",
    "writing": "asynchronous write to disk",
    "longest_pause": "longest pause of the main thread during the write",
}
wall_seconds = partial(seconds_of, clock=time.perf_counter)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    model_size: str = flag("140M", "a size of the ladder", metavar="NAME")
    rounds: int = flag(5, "checkpoints that are saved")
    folder: str | None = flag(
        None, "where to write them; they are removed again; default the system's temporary folder", metavar="DIR"
    )
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("rounds",))


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    try:
        config = ladder_model(options.model_size)
    except ConfigurationError as error:
        refuse(error)
    torch.set_num_threads(1)
    ranks = initialize_parallel()
    try:
        vocabulary = Vocabulary(GPT2_VOCABULARY)
        engine = build_engine(config, vocabulary, ranks, ParallelConfig(), seed=1, bf16=False, compile=False)
        optimizer = build_optimizer(engine, OptimizerConfig())
        start_state(optimizer, 0)
        with tempfile.TemporaryDirectory(dir=options.folder) as root:
            report = measure(options, Path(root), lambda: engine.tensors(optimizer), ranks)
    finally:
        destroy_parallel()
    publish(report, table(report), options.output)


def measure(options: Options, root: Path, state: Callable[[], dict[str, Tensor]], ranks: ParallelContext) -> dict:
    """Return the report: seconds of each operation by round, with settings, sizes and versions."""
    tensors = [tensor.to_local() for tensor in state().values()]
    pairs = [(tensor.clone(), tensor) for tensor in tensors]
    seconds = {name: [] for name in OPERATIONS}
    with Saver(root, ranks) as saver:
        reserving = wall_seconds(lambda: (saver.reserve(state()), saver.wait()))
        for iteration in range(options.rounds):
            seconds["copy"].append(wall_seconds(lambda: [copy.copy_(tensor) for copy, tensor in pairs]))
            seconds["clone"].append(wall_seconds(lambda: [tensor.clone() for tensor in tensors]))
            complete = threading.Event()
            start = time.perf_counter()
            saver.save(state(), {"iteration": iteration}, complete.set)
            now = time.perf_counter()
            seconds["stall"].append(now - start)
            longest_pause = 0.0
            while not complete.is_set():
                previous, now = now, time.perf_counter()
                longest_pause = max(longest_pause, now - previous)
            seconds["writing"].append(now - start)
            seconds["longest_pause"].append(longest_pause)
            saver.wait()
            CheckpointStore(root).prune(keep=set())
    return {
        "settings": asdict(options),
        "parameters": sum(tensor.numel() for tensor in tensors) // 3,
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "tensors": len(tensors),
        "environment": environment(torch.device("cpu"), "safetensors"),
        "seconds": seconds | {"reserving": reserving},
        "ratios": {f"stall : {name}": summary(ratios(seconds["stall"], seconds[name])) for name in ("copy", "clone")},
    }


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    seconds = report["seconds"]
    rows = []
    for name, description in OPERATIONS.items():
        compared = spread(ratios(seconds["stall"], seconds[name])) if name in ("copy", "clone") else ["", ""]
        rows.append((description, *spread(seconds[name], ".1f", unit=1e-3), *compared))
    size = f"{report['settings']['model_size']}, {report['bytes'] / 1e9:.2f} GB in {report['tensors']} tensors"
    columns = ("operation", "ms", "min - max", "stall / operation", "min - max")
    allocation = f"memory for the copies was allocated in {seconds['reserving']:.1f} s of the thread"
    return f"{size}; {allocation}\n\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    main()
