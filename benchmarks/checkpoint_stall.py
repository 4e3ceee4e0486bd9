#!/usr/bin/env python3
"""Measure how long training waits for a checkpoint, beside a plain copy of the same bytes; print JSON.

    python benchmarks/checkpoint_stall.py
    python benchmarks/checkpoint_stall.py --model-size 35M --rounds 3 --output stall.json

A network of the ladder in fp32 with two Adam moments, in a group of one process, on the CPU. Every round takes the
time of four things: `copy_` of all tensors into memory that is there, `clone` of them, the call that saves (the stall),
and the writing that goes on behind it. Until the file is complete the main thread looks at the clock, over and over:
the longest time between two looks is what the writing thread keeps from it.
"""

import os

# before torch is imported: one thread, and no accelerator
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import json
import platform
import sys
import tempfile
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
from megatron.config.sections import OptimizerConfig, ParallelConfig, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY, ladder_model
from megatron.errors import ConfigurationError
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training import checkpoint
from megatron.training.environment import device_name
from megatron.training.optimizer import build_optimizer, start_state
from megatron.training.saver import Saver


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    model_size: str = flag("140M", "a size of the ladder", metavar="NAME")
    rounds: int = flag(5, "checkpoints that are saved")
    folder: str | None = flag(None, "where to write them, and remove them again; default the system's", metavar="DIR")
    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")

    def __post_init__(self):
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")


def main() -> None:
    options = read_options(Options, __doc__)
    try:
        config = ladder_model(options.model_size)
    except ConfigurationError as error:
        refuse(error)
    torch.set_num_threads(1)
    ranks = initialize_parallel()
    try:
        vocabulary = Vocabulary(GPT2_VOCABULARY)
        engine = build_engine(config, vocabulary, 1, ranks, ParallelConfig(), bf16=False, compile=False)
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
    """Return the seconds of everything by round, and what they were measured of and with."""
    tensors = [tensor.to_local() for tensor in state().values()]
    there = [tensor.clone() for tensor in tensors]
    seconds = {name: [] for name in ("copy", "clone", "stall", "writing", "longest_pause")}
    with Saver(root, ranks) as saver:
        reserving = _seconds(lambda: (saver.reserve(state()), saver.wait()))
        for turn in range(options.rounds):
            seconds["copy"].append(_seconds(lambda: [a.copy_(b) for a, b in zip(there, tensors, strict=True)]))
            seconds["clone"].append(_seconds(lambda: [tensor.clone() for tensor in tensors]))
            complete = []
            begin = time.perf_counter()
            saver.save(state(), {"iteration": turn}, lambda: complete.append(True))
            looked = time.perf_counter()
            seconds["stall"].append(looked - begin)
            pause = 0.0
            while not complete:
                before, looked = looked, time.perf_counter()
                pause = max(pause, looked - before)
            seconds["writing"].append(looked - begin)
            seconds["longest_pause"].append(pause)
            saver.wait()
            checkpoint.prune(root, keep=set())
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


def _ratio(times: list[float], others: list[float]) -> dict[str, float]:
    """Return median, smallest and largest of the ratios within a round."""
    ratios = [time / other for time, other in zip(times, others, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
