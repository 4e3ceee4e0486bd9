#!/usr/bin/env python3
"""Time our training step against those of other systems, and report the utilisation of the device: one device, bf16.

    python benchmarks/training_step/run.py                                    # on the GPU, or one CPU thread
    python benchmarks/training_step/run.py --model-size 140M --seq-length 2048 --micro-batch-size 16 --micro-batches 4
    python benchmarks/training_step/run.py --only "ours *" "litgpt AR compiled" --rounds 15 --output step.json

1. The ceilings of the device are measured (ceilings.py).
2. All implementations have the same model, weights, batches and optimizer. Each takes steps with learning rate 0 that
   score a few positions only. Loss and gradient norm must match those of the first implementation with the same
   objective, which is our eager step unless --only excludes it. This also warms up and compiles.
3. Every round times each implementation, in a rotating order. Ratios are taken within a round. After every round the
   figures so far are written to --output. With --time-limit, ours are timed for a round before a peer is warmed up.

A step is forward, backward, gradient accumulation, clipping, optimizer and zeroing the gradients. It moves batches to
the device that were prepared in advance. Time is wall-clock time between synchronisations on CUDA, and CPU time of the
process on a CPU.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import sys
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks.harness import Timings, chosen_device, interleave, publish, read_options, refuse, save
from benchmarks.training_step import ceilings, parity, published, report
from benchmarks.training_step.implementations import Implementation, Shape
from benchmarks.training_step.options import Options, shape_of
from benchmarks.training_step.peers import PEERS, implementations, missing
from megatron.batch import Batch
from megatron.config.flags import require
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel

LEARNING_RATE = 1e-4
START = time.monotonic()


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    chosen_device(options)
    torch.set_num_threads(1)
    try:
        shape = shape_of(options)
        ranks = initialize_parallel()
        result = measure(options, shape, select(options, shape, ranks), ranks.device)
    except ConfigurationError as error:
        refuse(error)
    except torch.OutOfMemoryError as error:
        remedy = "give fewer implementations with --only, or a smaller --micro-batch-size with more --micro-batches"
        sys.exit(f"error: {str(error).splitlines()[0].rstrip('.')}; {remedy}")
    finally:
        destroy_parallel()
    publish(result, report.tables(result), None)
    write(result, options)


def select(options: Options, shape: Shape, ranks: ParallelContext) -> list[Implementation]:
    """Return the implementations that the flags select and that can run; print a line for each peer that cannot."""
    available = implementations(shape, False, ranks)
    if options.compile:
        available += implementations(shape, True, ranks)
    if options.published is not None:
        problem = published.missing(options.published, ranks.device)
        require(problem is None, "published", options.published, problem)
        available += published.implementations(shape, options.published, options.compile, ranks)
    for pattern in options.only:
        no_match = f"matches no implementation; choose from {', '.join(choice.name for choice in available)}"
        require(any(fnmatchcase(choice.name, pattern) for choice in available), "only", pattern, no_match)
    selected = [
        choice
        for choice in available
        if not options.only or any(fnmatchcase(choice.name, pattern) for pattern in options.only)
    ]
    systems = {choice.system for choice in selected}
    problems = {peer: problem for peer in PEERS if peer in systems and (problem := missing(peer))}
    for peer, problem in problems.items():
        if options.require_peers:
            raise ConfigurationError(f"--require-peers: {peer} cannot run, {problem}; see benchmarks/README.md")
        print(f"{peer}: skipped, {problem}")
    return [choice for choice in selected if choice.system not in problems]


def measure(options: Options, shape: Shape, implementations: list[Implementation], device: torch.device) -> dict:
    """Return the report of a run: all measurements, figures and gates."""
    exactness = parity.check_exactness(options, shape, device)
    measured_ceilings = ceilings.measure(shape, options.micro_batch_size, device)
    print(report.ceilings_line(measured_ceilings), flush=True)
    check_batches = parity.check_batches(options, shape)
    batches = parity.batches(options, shape, options.rounds * options.steps)
    num_scored = {
        kind: float(np.mean([len(batch.scored_positions) for step in steps for batch in step]))
        for kind, steps in batches.items()
    }

    warm: set[str] = set()  # names

    def timed(selected: list[Implementation], rounds: int, learning_rate: float = LEARNING_RATE) -> dict:
        """Check, warm up and time implementations; return their report, which every round also writes."""
        differences = parity.check(
            selected, check_batches, lambda choice: choice.name not in warm and is_late(options, 0.7)
        )
        warm.update(differences)
        selected = [choice for choice in selected if choice.name in differences]
        contestants = {
            choice.name: turns(choice, batches[choice.batches], options.steps, learning_rate) for choice in selected
        }

        def described(timings: Timings) -> dict:
            measurements = report.Measurements(
                ceilings=measured_ceilings,
                exactness=exactness,
                parity=differences,
                num_scored=num_scored,
                times={name: [value / options.steps for value in seconds] for name, seconds in timings.seconds.items()},
                memory=timings.memory,
            )
            return report.describe(options, shape, device, implementations=selected, measurements=measurements)

        timings = interleave(
            contestants,
            rounds,
            device,
            after_round=lambda timings: write(described(timings), options),
            is_over=partial(is_late, options, 0.9),
        )
        return described(timings)

    own = [choice for choice in implementations if choice.system == "ours"]
    if options.time_limit is not None and own and own != implementations:
        # a limit that ends the process while a peer compiles loses only peers; their check needs the initial weights
        timed(own, 1, learning_rate=0.0)
    return timed(implementations, options.rounds)


def write(result: dict, options: Options) -> None:
    """Write a report to --output, if it is given."""
    if options.output:
        save(result, report.tables(result) if options.tables else None, options.output)


def is_late(options: Options, share: float) -> bool:
    """Return whether this share of --time-limit is over."""
    return options.time_limit is not None and time.monotonic() - START > share * options.time_limit


def turns(
    implementation: Implementation, batches: list[list[Batch]], steps: int, learning_rate: float
) -> Callable[[int], None]:
    """Return the function that takes the `steps` steps of a round."""

    def turn(number: int) -> None:
        for step in batches[number * steps : (number + 1) * steps]:
            implementation.step(step, learning_rate)

    return turn


if __name__ == "__main__":
    main()
