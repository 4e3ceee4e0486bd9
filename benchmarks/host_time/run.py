#!/usr/bin/env python3
"""Time the host's work in a compiled AR step, ours against transformers and a plain PyTorch loop, without a GPU.

    python benchmarks/host_time/run.py --output host_time.json
    torchrun --standalone --nproc-per-node 2 benchmarks/host_time/run.py        # ours with ZeRO stage 1

The model is as deep as 140M but so narrow that its kernels take next to no time: what remains is what the host does
between kernels, which a GPU would wait for. Time is CPU time of the main thread, so it is without communication.
Every round times one step of each, in a rotating order; ratios to transformers are taken within a round. Calls are
those of Python and C functions in a step, as Python's profiler reports them, by the file that makes them; load of the
machine does not change them.
training_step/ checks that all of them compute the same. The peers run on a single rank, without data parallelism.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm

from benchmarks.harness import (
    environment,
    markdown_table,
    output_flag,
    publish,
    ratios,
    read_options,
    require_positive,
    rotated,
    seconds_of,
    spread,
)
from benchmarks.training_step import options as training_step
from benchmarks.training_step.parity import batches
from benchmarks.training_step.peers import implementations, missing
from megatron.config.flags import flag
from megatron.config.sizes import LADDER
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel

SYSTEMS = ("ours", "transformers", "nanogpt")
REFERENCE = "transformers"
MOST = 1.2  # times the host time of the reference
WARM_UP = 3  # steps; the first one compiles
LEARNING_RATE = 1e-4
# by words in the paths of files; code that PyTorch generates at run time has the name of its module instead of a path
PARTS = {
    "generated code": ("torchinductor",),
    "torch.compile": ("_dynamo", "_functorch", "_inductor", "_aot_autograd", "_config_module", "_guards", "_compile"),
    "FSDP2": ("_fully_shard",),
}
REST = "rest"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    num_layers: int = flag(LADDER["140M"][0], "number of transformer blocks")
    micro_batches: int = flag(8, "micro-batches per step")
    rounds: int = flag(9, "rounds; a round times a step of each implementation")
    compile: bool = flag(True, "compiled implementations; else eager ones")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("num_layers", "micro_batches", "rounds"))


def calls_of(work: Callable[[], object]) -> dict[str, int]:
    """Return how many calls of Python and C functions `work` makes in this thread, by the part that makes them."""
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            counts[part_of(frame.f_code.co_filename)] += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return {part: counts[part] for part in (*PARTS, REST)}


@cache
def part_of(file: str) -> str:
    """Return the part (of PARTS) that a source file belongs to, or REST."""
    return next((part for part, words in PARTS.items() if any(word in file for word in words)), REST)


def measure(options: Options, ranks: ParallelContext) -> dict:
    """Return the report: seconds of each round, and calls of a step, by system."""
    narrow = training_step.Options(
        num_layers=options.num_layers,
        hidden_size=32,
        num_attention_heads=1,
        vocab_size=100,
        seq_length=8,
        micro_batch_size=1,
        micro_batches=options.micro_batches,
    )
    shape = training_step.shape_of(narrow)
    available = implementations(shape, options.compile, ranks)
    steps = {choice.system: choice.step for choice in available if is_timed(choice.system, choice.objective)}
    text = batches(narrow, shape, WARM_UP + options.rounds + 1)["ar"]
    for step in tqdm(steps.values(), "warm up", leave=False, disable=None):
        for micro_batches in text[:WARM_UP]:
            step(micro_batches, LEARNING_RATE)
    calls = {system: calls_of(partial(step, text[WARM_UP], LEARNING_RATE)) for system, step in steps.items()}
    seconds: dict[str, list[float]] = {system: [] for system in steps}
    for turn, micro_batches in enumerate(text[WARM_UP + 1 :]):
        for system in rotated(list(steps), turn):
            work = partial(steps[system], micro_batches, LEARNING_RATE)
            seconds[system].append(seconds_of(work, time.thread_time))
    return {
        "environment": environment(ranks.device, "transformers"),
        "settings": vars(options),
        "seconds": seconds,
        "calls": calls,
    }


def is_timed(system: str, objective: str) -> bool:
    """Return whether a training step is timed: of AR, and of a system that is installed."""
    return system in SYSTEMS and objective == "ar" and (system == "ours" or missing(system) is None)


def table(report: dict) -> str:
    """Return the report as Markdown: the host's time by system, its calls by part, and the target."""
    seconds = report["seconds"]
    rows = []
    for name, times in seconds.items():
        against = spread(ratios(times, seconds[REFERENCE])) if REFERENCE in seconds else ["-", "-"]
        rows.append((name, *spread(times, ".1f", unit=1e-3), *against))
    lines = [
        markdown_table(("system", "ms of the host / step", "min - max", f"/ {REFERENCE}", "min - max"), rows),
        markdown_table(
            ("system", "calls / step", *PARTS, REST),
            [(name, sum(parts.values()), *parts.values()) for name, parts in report["calls"].items()],
        ),
        f"Target: ours takes at most {MOST} times the host time of {REFERENCE}.\n",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    ranks = initialize_parallel()
    try:
        report = measure(options, ranks)
    finally:
        destroy_parallel()
    if ranks.rank == 0:
        publish(report, table(report), options.output)


if __name__ == "__main__":
    main()
