#!/usr/bin/env python3
"""Time our training step against those of other systems, and report the utilisation of the device: one device, bf16.

    python benchmarks/train_step.py                                    # on the GPU, or one CPU thread
    python benchmarks/train_step.py --model-size 140M --seq-length 2048 --micro-batch-size 16 --micro-batches 4
    python benchmarks/train_step.py --only "ours *" "litgpt AR compiled" --rounds 15 --output step.json

1. The ceilings of the device are measured (ceilings.py).
2. All implementations have the same model, weights, batches and optimizer. Each takes steps with learning rate 0 that
   score a few positions only. Loss and gradient norm must match those of the first implementation with the same
   objective, which is our eager step unless --only excludes it. This also warms up and compiles.
3. Every round times each implementation, in a rotating order. Ratios are taken within a round.

A step is forward, backward, gradient accumulation, clipping, optimizer and zeroing the gradients. It moves batches to
the device that were prepared in advance. Time is wall-clock time between synchronisations on CUDA, and CPU time of the
process on a CPU.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import sqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import ceilings, published, report
from benchmarks.contestants import PEERS, Implementation, Shape, implementations, missing
from benchmarks.meter import clock, peak_memory, start_memory
from benchmarks.options import read_options, refuse
from megatron.batch import Batch
from megatron.config.flags import flag, require, typed
from megatron.config.sections import ModelConfig, ObjectiveConfig
from megatron.config.sizes import GPT2_VOCABULARY, ladder_settings
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import build_objective
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.randomness import stream

LEARNING_RATE = 1e-4
DEFAULT_MODEL = {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4}
# divided by sqrt(hidden size): large enough that attention and MLP affect the loss of a few positions, not the
# embedding alone; with twice as much, bf16 rounding affects it too in models of 32 blocks
INIT_STD = 0.8
CHECK_STEPS = 3
CHECK_POSITIONS = 8  # scored per micro-batch of the check
TOLERANCE = {"loss": 1e-2, "gradient norm": 5e-2}  # relative, for bf16
EXACTNESS = {"loss": 1e-5, "cosine": 0.9999}  # in fp32, the head at scored positions only against all positions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    model_size: str | None = flag(None, "a size of the ladder, instead of the three flags below", metavar="NAME")
    num_layers: int | None = flag(None, f"number of transformer blocks; default {DEFAULT_MODEL['num_layers']}")
    hidden_size: int | None = flag(
        None,
        f"width of the residual stream, default {DEFAULT_MODEL['hidden_size']}; the SwiGLU MLP has floor(8h/3/64)*64",
    )
    num_attention_heads: int | None = flag(None, f"number of heads; default {DEFAULT_MODEL['num_attention_heads']}")
    vocab_size: int = flag(
        GPT2_VOCABULARY, "vocabulary size of the tokenizer; [MASK] is added, then padded to a multiple of 128"
    )
    seq_length: int = flag(512, "tokens per sample")
    micro_batch_size: int = flag(2, "samples per micro-batch")
    micro_batches: int = flag(1, "micro-batches per step")
    rounds: int = flag(9, "rounds; a round times every implementation once")
    steps: int = flag(2, "steps of an implementation per round")
    device: str | None = flag(None, "where to run; default a GPU if there is one", choices=("cuda", "cpu"))
    only: tuple[str, ...] = flag(
        (), 'implementations to run, names with wildcards, as in --only "ours *" "* AR compiled"', metavar="PATTERN"
    )
    compile: bool = flag(True, "also time the compiled implementations")
    require_peers: bool = flag(False, "fail if a peer is not installed, instead of skipping it")
    published: str | None = flag(
        None, f"folder of a clone of {published.REPOSITORY}; also time its model", metavar="DIR"
    )
    output: str | None = flag(None, "write settings, versions, all times, figures and gates as JSON", metavar="FILE")

    def __post_init__(self):
        for name in ("vocab_size", "seq_length", "micro_batch_size", "micro_batches", "rounds", "steps"):
            value = getattr(self, name)
            require(value >= 1, name, value, "must be at least 1")
        tokens = self.micro_batch_size * self.seq_length
        require(
            tokens >= CHECK_POSITIONS,
            "seq_length",
            self.seq_length,
            f"gives fewer than {CHECK_POSITIONS} tokens per micro-batch; give more",
        )
        model_flags = [typed(name, getattr(self, name)) for name in DEFAULT_MODEL if getattr(self, name) is not None]
        conflict = f"sets layers, width and heads; leave out {' and '.join(model_flags)}"
        require(self.model_size is None or not model_flags, "model_size", self.model_size, conflict)
        folder = Path(self.output or ".").parent
        require(folder.is_dir(), "output", self.output, f"{folder} is not a folder; create it first")


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # takes effect because CUDA is not initialised yet
    torch.set_num_threads(1)
    try:
        no_gpu = "there is no GPU that PyTorch can use; leave the flag out to run on the CPU"
        require(options.device != "cuda" or torch.cuda.is_available(), "device", options.device, no_gpu)
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
    report.show(result)
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


def shape_of(options: Options) -> Shape:
    """Return the model and sequence length that the flags describe."""
    if options.model_size is not None:
        settings = ladder_settings(options.model_size)
    else:
        flags = {name: getattr(options, name) for name in DEFAULT_MODEL}
        settings = DEFAULT_MODEL | {name: value for name, value in flags.items() if value is not None}
    model = ModelConfig(**settings, init_method_std=INIT_STD / sqrt(max(1, settings["hidden_size"])))
    return Shape(model, Vocabulary(options.vocab_size), options.seq_length)


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
    exactness = check_exactness(options, shape, device)
    measured_ceilings = ceilings.measure(shape, options.micro_batch_size, device)
    parity = check(implementations, check_batches(options, shape))
    batches_by_kind = batches(options, shape, options.rounds * options.steps)
    num_scored = {
        kind: float(np.mean([len(batch.scored_positions) for step in steps for batch in step]))
        for kind, steps in batches_by_kind.items()
    }
    times, memory = compete(implementations, batches_by_kind, options, device)
    measurements = report.Measurements(measured_ceilings, exactness, parity, num_scored, times, memory)
    return report.describe(options, shape, device, implementations, measurements)


def batches(options: Options, shape: Shape, steps: int, seed: int = 1) -> dict[str, list[list[Batch]]]:
    """Return the micro-batches of `steps` steps by `Implementation.batches`, all made of the same random text."""
    size = options.micro_batch_size
    num_micro_batches = options.micro_batches
    num_samples = steps * num_micro_batches * size
    by_kind = {}
    for name in ("ar", "mdm"):
        objective = build_objective(ObjectiveConfig(objective=name), shape.vocabulary, time_block=num_samples)
        micro_batches = []
        for sample_index in range(0, num_samples, size):
            random = stream(seed, "benchmark text", sample_index)
            ids = random.integers(0, shape.vocabulary.size, (size, shape.seq_length + 1))  # [B, S + 1]
            micro_batches.append(objective.prepare(ids, range(sample_index, sample_index + size), seed))
        by_kind[name] = [
            micro_batches[start : start + num_micro_batches]
            for start in range(0, len(micro_batches), num_micro_batches)
        ]
    by_kind["mdm full head"] = [[score_all(batch) for batch in step] for step in by_kind["mdm"]]
    if not torch.cuda.is_available():
        return by_kind
    # pinned, as the data loader returns them: copies from pageable memory block the host
    return {kind: [[batch.pin_memory() for batch in step] for step in steps] for kind, steps in by_kind.items()}


def score_all(batch: Batch) -> Batch:
    """Return the batch with every position in `scored_positions`, so that last block and head run at all of them."""
    return replace(batch, scored_positions=torch.arange(batch.weights.numel()))


def check_batches(options: Options, shape: Shape) -> dict[str, list[list[Batch]]]:
    """Return steps that score `CHECK_POSITIONS` positions of a micro-batch, with weight 1, by `Implementation.batches`.

    The mean loss over many positions of random text is nearly the same for every model; over a few it is not.
    """
    by_kind = batches(options, shape, CHECK_STEPS, seed=2)
    sparse = {kind: [[_score_few(batch) for batch in step] for step in by_kind[kind]] for kind in ("ar", "mdm")}
    return sparse | {"mdm full head": [[score_all(batch) for batch in step] for step in sparse["mdm"]]}


def _score_few(batch: Batch) -> Batch:
    scored = torch.linspace(0, batch.weights.numel() - 1, CHECK_POSITIONS).long()
    weights = torch.zeros(batch.weights.numel()).index_fill(0, scored, 1.0).view_as(batch.weights)  # [B, S]
    counts = np.full(len(weights), CHECK_POSITIONS / len(weights))  # [B]
    return Batch(batch.tokens, batch.targets, weights, counts, batch.causal)


def check_exactness(options: Options, shape: Shape, device: torch.device) -> dict[str, float]:
    """Return relative loss difference and gradient cosine of scored positions only against all positions.

    Our model in fp32, on one sample. Exits with an error if they exceed `EXACTNESS`.
    """
    single_sample = replace(options, micro_batch_size=1, micro_batches=1)
    ((batch,),) = batches(single_sample, shape, 1)["mdm"]
    model = shape.ours().to(device)
    losses = []
    gradients = []
    for variant in (batch, score_all(batch)):
        loss = model(variant.to(device)).sum() / variant.count
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
    scored, full = gradients
    difference = abs(losses[0] - losses[1]) / abs(losses[1])
    cosine = _dot(scored, full) / sqrt(_dot(scored, scored) * _dot(full, full))
    if not (difference <= EXACTNESS["loss"] and cosine >= EXACTNESS["cosine"]):
        sys.exit(
            f"scored positions only and all positions differ in fp32: relative loss difference {difference:.2g}, "
            f"gradient cosine {cosine:.6f}"
        )
    return {"loss": difference, "cosine": cosine}


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(torch.dot(x.flatten(), y.flatten()).item() for x, y in zip(left, right, strict=True))


def check(implementations: list[Implementation], batches: dict[str, list[list[Batch]]]) -> dict[str, dict[str, float]]:
    """Return the largest relative differences of loss and gradient norm, by name of the implementation.

    Each is compared with the first implementation of the same objective. Exits with an error if one exceeds
    `TOLERANCE`. Implementations with dropout are only warmed up.
    """
    references = {}  # objective -> name of the first implementation, its (loss, gradient norm) by step
    parity = {}
    for implementation in tqdm(implementations, "check and warm up", leave=False):
        results = [tuple(map(float, implementation.step(step, 0.0))) for step in batches[implementation.batches]]
        if implementation.dropout:
            continue
        reference, expected = references.setdefault(implementation.objective, (implementation.name, results))
        parity[implementation.name] = differences = dict.fromkeys(TOLERANCE, 0.0)
        for expected_values, values in zip(expected, results, strict=True):
            for (quantity, tolerance), x, y in zip(TOLERANCE.items(), expected_values, values, strict=True):
                if not abs(x - y) <= tolerance * abs(x):
                    sys.exit(
                        f"{implementation.name} computes something else: its {quantity} is {y:.5g}, "
                        f"that of {reference} {x:.5g}"
                    )
                differences[quantity] = max(differences[quantity], abs(x - y) / abs(x))
        gc.collect()  # building a model leaves reference cycles
    losses = [
        f"{objective.upper()} {' '.join(f'{loss:.3f}' for loss, _ in results)}"
        for objective, (_, results) in references.items()
    ]
    print(f"check passed: same loss and gradient norm from the same weights ({', '.join(losses)})")
    return parity


def compete(
    implementations: list[Implementation],
    batches: dict[str, list[list[Batch]]],
    options: Options,
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Return (seconds per step by round, bytes on CUDA in the last round), both by name of the implementation.

    "peak" includes what all implementations keep allocated between their turns, "step" excludes it.
    """
    times = {implementation.name: [] for implementation in implementations}
    memory = {}
    with tqdm(total=options.rounds * len(implementations), desc="rounds", leave=False) as bar:
        for turn in range(options.rounds):
            shift = turn % len(implementations)
            for implementation in implementations[shift:] + implementations[:shift]:
                steps = batches[implementation.batches][turn * options.steps : (turn + 1) * options.steps]
                allocated = start_memory(device)
                start = clock(device)
                for step in steps:
                    implementation.step(step, LEARNING_RATE)
                times[implementation.name].append((clock(device) - start) / options.steps)
                if allocated is not None:
                    peak = peak_memory(device)
                    memory[implementation.name] = {"peak": peak, "step": peak - allocated}
                bar.update()
    return times, memory


if __name__ == "__main__":
    main()
