#!/usr/bin/env python3
"""Measure how long training stalls for a checkpoint, compared with a plain copy of the same bytes; print JSON.

    python benchmarks/checkpoint_stall.py
    python benchmarks/checkpoint_stall.py --model-size 35M --rounds 3 --output stall.json

A model of the ladder in fp32 with two Adam moments, world size 1, on the CPU. Every round times `copy_` of all tensors
into preallocated memory, `clone` of all tensors, the call that saves (the stall), and the asynchronous write that
follows. Until the file is complete the main thread polls the clock: the longest time between two polls is the longest
pause that the writer thread causes.
"""

import os

# before torch is imported: one thread, no accelerator
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.contestants import version
from benchmarks.options import read_options, refuse
from megatron.config.flags import flag, require
from megatron.config.sections import OptimizerConfig, ParallelConfig
from megatron.config.sizes import GPT2_VOCABULARY, ladder_model
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training.checkpoint_store import CheckpointStore
from megatron.training.environment import device_name
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.saver import Saver


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    model_size: str = flag("140M", "a size of the ladder", metavar="NAME")
    rounds: int = flag(5, "checkpoints that are saved")
    folder: str | None = flag(
        None, "where to write them; they are removed again; default the system's temporary folder", metavar="DIR"
    )
    output: str | None = flag(None, "also write the JSON to a file", metavar="FILE")

    def __post_init__(self):
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")


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
    print(json.dumps(report, indent=1))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def measure(options: Options, root: Path, state: Callable[[], dict[str, Tensor]], ranks: ParallelContext) -> dict:
    """Return the report: seconds of each operation by round, with settings, sizes and versions."""
    tensors = [tensor.to_local() for tensor in state().values()]
    preallocated = [tensor.clone() for tensor in tensors]
    seconds = {name: [] for name in ("copy", "clone", "stall", "writing", "longest_pause")}
    with Saver(root, ranks) as saver:
        reserving = _seconds(lambda: (saver.reserve(state()), saver.wait()))
        for iteration in range(options.rounds):
            seconds["copy"].append(_seconds(lambda: [a.copy_(b) for a, b in zip(preallocated, tensors, strict=True)]))
            seconds["clone"].append(_seconds(lambda: [tensor.clone() for tensor in tensors]))
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
    ratios = {f"stall : {name}": _ratio(seconds["stall"], seconds[name]) for name in ("copy", "clone")}
    return {
        "settings": asdict(options),
        "parameters": sum(tensor.numel() for tensor in tensors) // 3,
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "tensors": len(tensors),
        "versions": {name: version(name) for name in ("torch", "safetensors")},
        "python": platform.python_version(),
        "machine": device_name(torch.device("cpu")),
        "date": date.today().isoformat(),
        "seconds": seconds | {"reserving": reserving},
        "ratios": ratios,
    }


def _ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Return median, smallest and largest of the ratios by round."""
    ratios = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
