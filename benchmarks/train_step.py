#!/usr/bin/env python3
"""Time our training step beside those of other systems, and say what share of the device it uses: one device, bf16.

    python benchmarks/train_step.py                                    # the GPU, or one thread of the CPU
    python benchmarks/train_step.py --model-size 140M --seq-length 2048 --micro-batch-size 16 --micro-batches 4
    python benchmarks/train_step.py --only "ours *" "litgpt AR compiled" --rounds 15 --output step.json

First the device's ceilings are measured (ceilings.py). All contestants have one network and the same weights, batches
and optimizer. Each takes steps of learning rate 0 that score a few positions only, and loss and gradient norm must be
those of the first contestant with its objective, our eager step unless --only leaves it out: this also warms up and
compiles. Then every round times each of them, in an order that rotates, and each ratio is taken within a round.
A step is forward, backward, accumulation, clipping, optimizer and zeroing the gradients, and moves batches that were
prepared before. Time is wall time between synchronisations on CUDA, and CPU time of the process on a CPU.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import gc
import json
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import sqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import ceilings, published, report
from benchmarks.contestants import PEERS, Contestant, Shape, contestants, missing
from benchmarks.meter import clock, peak_memory, start_memory
from benchmarks.options import read_options, refuse
from megatron.batch import Batch
from megatron.config.flags import flag, require, typed
from megatron.config.sections import ModelConfig, ObjectiveConfig, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY, ladder_settings
from megatron.errors import ConfigurationError
from megatron.objectives import build_objective
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.randomness import stream

LEARNING_RATE = 1e-4
NETWORK = {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4}  # where none is given
# / sqrt(width): attention and MLP, not the embedding alone, decide the loss of a few positions; with twice as much,
# rounding to bf16 does too where there are 32 blocks
INIT_STD = 0.8
PROBES, PROBED = 3, 8  # steps of the check, and positions that each of their micro-batches scores
TOLERANCE = {"loss": 1e-2, "gradient norm": 5e-2}  # relative, for bf16
EXACT = {"loss": 1e-5, "cosine": 0.9999}  # in fp32, of asking for scored positions only and for all


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    model_size: str | None = flag(None, "a size of the ladder, instead of the three flags below", metavar="NAME")
    num_layers: int | None = flag(None, f"number of transformer blocks; default {NETWORK['num_layers']}")
    hidden_size: int | None = flag(
        None,
        f"width of the residual stream, default {NETWORK['hidden_size']}; the SwiGLU MLP has floor(8h/3/64)*64",
    )
    num_attention_heads: int | None = flag(None, f"number of heads; default {NETWORK['num_attention_heads']}")
    vocab_size: int = flag(GPT2_VOCABULARY, "ids of the tokenizer; [MASK] is added, then rows up to a multiple of 128")
    seq_length: int = flag(512, "tokens of one sample")
    micro_batch_size: int = flag(2, "samples of one micro-batch")
    micro_batches: int = flag(1, "micro-batches of one step")
    rounds: int = flag(9, "rounds; one round times every contestant once")
    steps: int = flag(2, "steps of one contestant in a round")
    device: str | None = flag(None, "where to run; default a GPU where there is one", choices=("cuda", "cpu"))
    only: tuple[str, ...] = flag(
        (), 'contestants to run, by names with wildcards, as in --only "ours *" "* AR compiled"', metavar="PATTERN"
    )
    compile: bool = flag(True, "time the compiled contestants too")
    require_peers: bool = flag(False, "fail where a peer is not installed, instead of leaving it out")
    published: str | None = flag(
        None, f"folder of a clone of {published.REPOSITORY}; its model is timed beside ours", metavar="DIR"
    )
    output: str | None = flag(None, "write settings, versions, all times, figures and gates as JSON", metavar="FILE")

    def __post_init__(self):
        for name in ("vocab_size", "seq_length", "micro_batch_size", "micro_batches", "rounds", "steps"):
            value = getattr(self, name)
            require(value >= 1, name, value, "must be at least 1")
        tokens = self.micro_batch_size * self.seq_length
        require(
            tokens >= PROBED, "seq_length", self.seq_length, f"gives less than {PROBED} tokens a micro-batch; give more"
        )
        given = [typed(name, getattr(self, name)) for name in NETWORK if getattr(self, name) is not None]
        rule = f"says layers, width and heads itself; leave out {' and '.join(given)}"
        require(self.model_size is None or not given, "model_size", self.model_size, rule)
        folder = Path(self.output or ".").parent
        require(folder.is_dir(), "output", self.output, f"{folder} is no folder; make it first")


def main() -> None:
    options = read_options(Options, __doc__)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA reads it when it is first asked for a device
    torch.set_num_threads(1)
    try:
        rule = "there is no GPU that PyTorch can use; leave the flag out to run on the CPU"
        require(options.device != "cuda" or torch.cuda.is_available(), "device", options.device, rule)
        shape = shape_of(options)
        ranks = initialize_parallel()
        found = measure(options, shape, enter(options, shape, ranks), ranks.device)
    except ConfigurationError as error:
        refuse(error)
    except torch.OutOfMemoryError as error:
        remedy = "give fewer contestants with --only, or a smaller --micro-batch-size with more --micro-batches"
        sys.exit(f"error: {str(error).splitlines()[0].rstrip('.')}; {remedy}")
    finally:
        destroy_parallel()
    report.show(found)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")


def shape_of(options: Options) -> Shape:
    if options.model_size is not None:
        network = ladder_settings(options.model_size)
    else:
        given = {name: getattr(options, name) for name in NETWORK}
        network = NETWORK | {name: value for name, value in given.items() if value is not None}
    model = ModelConfig(**network, init_method_std=INIT_STD / sqrt(max(1, network["hidden_size"])))
    return Shape(model, Vocabulary(options.vocab_size), options.seq_length)


def enter(options: Options, shape: Shape, ranks: ParallelContext) -> list[Contestant]:
    """Return the contestants that are asked for and can run, with a line for each peer that cannot."""
    found = contestants(shape, False, ranks)
    found += contestants(shape, True, ranks) if options.compile else []
    if options.published is not None:
        obstacle = published.missing(options.published, ranks.device)
        require(obstacle is None, "published", options.published, obstacle)
        found += published.contestants(shape, options.published, options.compile, ranks)
    for pattern in options.only:
        rule = f"names no contestant; there are {', '.join(contestant.name for contestant in found)}"
        require(any(fnmatchcase(each.name, pattern) for each in found), "only", pattern, rule)
    if options.only:
        found = [each for each in found if any(fnmatchcase(each.name, pattern) for pattern in options.only)]
    asked = {contestant.system for contestant in found}
    obstacles = {peer: missing(peer) for peer in PEERS if peer in asked}
    absent = {peer: obstacle for peer, obstacle in obstacles.items() if obstacle}
    for peer, obstacle in absent.items():
        if options.require_peers:
            raise ConfigurationError(f"--require-peers: {peer} cannot run, {obstacle}; see benchmarks/README.md")
        print(f"{peer}: skipped, {obstacle}")
    return [contestant for contestant in found if contestant.system not in absent]


def measure(options: Options, shape: Shape, contestants: list[Contestant], device: torch.device) -> dict:
    """Return everything that the tables and the JSON say."""
    exact = exactness(options, shape, device)
    measured = ceilings.measure(shape, options.micro_batch_size, device)
    parity = check(contestants, probes(options, shape))
    made = batches(options, shape, options.rounds * options.steps)
    rows = {
        name: float(np.mean([len(batch.scored_positions) for step in made[name] for batch in step])) for name in made
    }
    times, memory = compete(contestants, made, options, device)
    found = report.Found(measured, exact, parity, rows, times, memory)
    return report.describe(options, shape, device, contestants, found)


def batches(options: Options, shape: Shape, steps: int, seed: int = 1) -> dict[str, list[list[Batch]]]:
    """Return the micro-batches of `steps` steps for every kind of contestant, made of the same random text."""
    size, each = options.micro_batch_size, options.micro_batches
    made = {}
    for name in ("ar", "mdm"):
        objective = build_objective(ObjectiveConfig(objective=name), shape.vocabulary, time_block=steps * each * size)
        found = []
        for first in range(0, steps * each * size, size):
            text = stream(seed, "benchmark text", first)
            ids = text.integers(0, shape.vocabulary.size, (size, shape.seq_length + 1))
            found.append(objective.prepare(ids, range(first, first + size), seed))
        made[name] = [found[start : start + each] for start in range(0, len(found), each)]
    made["mdm full head"] = [[whole(batch) for batch in step] for step in made["mdm"]]
    if not torch.cuda.is_available():
        return made
    # as the data loader does: from other memory the host would wait for the device
    return {name: [[batch.pin_memory() for batch in step] for step in found] for name, found in made.items()}


def whole(batch: Batch) -> Batch:
    """Return the batch with every position in `rows`: logits are then computed for all, and all are finished."""
    return replace(batch, scored_positions=torch.arange(batch.weights.numel()))


def probes(options: Options, shape: Shape) -> dict[str, list[list[Batch]]]:
    """Return steps of the full shape that score `PROBED` positions of a micro-batch with weight 1.

    The mean over many positions of random text is much the same for any network; that over a few is not.
    """
    made = batches(options, shape, PROBES, seed=2)
    thin = {name: [[_thinned(batch) for batch in step] for step in made[name]] for name in ("ar", "mdm")}
    return thin | {"mdm full head": [[whole(batch) for batch in step] for step in thin["mdm"]]}


def _thinned(batch: Batch) -> Batch:
    places = torch.linspace(0, batch.weights.numel() - 1, PROBED).long()
    weights = torch.zeros(batch.weights.numel()).index_fill(0, places, 1.0).view_as(batch.weights)
    return Batch(batch.tokens, batch.targets, weights, np.full(len(weights), PROBED / len(weights)), batch.causal)


def exactness(options: Options, shape: Shape, device: torch.device) -> dict[str, float]:
    """Return how far asking for scored positions only is from asking for all, for our model in fp32 on one sample.

    Leaves with an error where the two are not the same.
    """
    sample = replace(options, micro_batch_size=1, micro_batches=1)
    ((batch,),) = batches(sample, shape, 1)["mdm"]
    model = shape.ours().to(device)
    losses, gradients = [], []
    for each in (batch, whole(batch)):
        loss = model(each.to(device)).sum() / each.count
        found = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        gradients.append(found)
    inner, *squares = (
        sum(torch.dot(x.flatten(), y.flatten()).item() for x, y in zip(left, right, strict=True))
        for left, right in ((gradients[0], gradients[1]), (gradients[0],) * 2, (gradients[1],) * 2)
    )
    loss, cosine = abs(losses[0] - losses[1]) / abs(losses[1]), inner / sqrt(squares[0] * squares[1])
    if not (loss <= EXACT["loss"] and cosine >= EXACT["cosine"]):
        sys.exit(f"scored positions only and all differ in fp32: loss by {loss:.2g}, gradient cosine {cosine:.6f}")
    return {"loss": loss, "cosine": cosine}


def check(contestants: list[Contestant], probes: dict[str, list[list[Batch]]]) -> dict[str, dict[str, float]]:
    """Return the largest relative differences of loss and gradient norm from the first contestant of an objective.

    Leaves with an error where they are too large.
    """
    expected, parity = {}, {}
    for contestant in tqdm(contestants, "check and warm up", leave=False):
        found = [tuple(map(float, contestant.step(step, 0.0))) for step in probes[contestant.batches]]
        if contestant.dropout:  # what falls out is drawn anew at every step
            continue
        first, wanted = expected.setdefault(contestant.objective, (contestant.name, found))
        parity[contestant.name] = off = dict.fromkeys(TOLERANCE, 0.0)
        for want, have in zip(wanted, found, strict=True):
            for (quantity, tolerance), x, y in zip(TOLERANCE.items(), want, have, strict=True):
                if not abs(x - y) <= tolerance * abs(x):
                    sys.exit(
                        f"{contestant.name} computes something else: its {quantity} is {y:.5g}, that of {first} {x:.5g}"
                    )
                off[quantity] = max(off[quantity], abs(x - y) / abs(x))
        gc.collect()  # what building a model left behind
    losses = [
        f"{objective.upper()} {' '.join(f'{loss:.3f}' for loss, _ in found)}"
        for objective, (_, found) in expected.items()
    ]
    print(f"check passed: same loss and gradient norm from the same weights ({', '.join(losses)})")
    return parity


def compete(
    contestants: list[Contestant], batches: dict[str, list[list[Batch]]], options: Options, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Return the seconds of one step, by contestant and round, and on CUDA the most bytes of its last turn.

    "peak" includes what all contestants keep between their turns, "step" is what came on top of that.
    """
    times, memory = {contestant.name: [] for contestant in contestants}, {}
    with tqdm(total=options.rounds * len(contestants), desc="rounds", leave=False) as bar:
        for turn in range(options.rounds):
            shift = turn % len(contestants)
            for contestant in contestants[shift:] + contestants[:shift]:
                todo = batches[contestant.batches][turn * options.steps : (turn + 1) * options.steps]
                kept = start_memory(device)
                start = clock(device)
                for step in todo:
                    contestant.step(step, LEARNING_RATE)
                times[contestant.name].append((clock(device) - start) / options.steps)
                if kept is not None:
                    peak = peak_memory(device)
                    memory[contestant.name] = {"peak": peak, "step": peak - kept}
                bar.update()
    return times, memory


if __name__ == "__main__":
    main()
