#!/usr/bin/env python3
"""Time our training step beside those of other systems: one thread of the CPU, bf16, CPU time.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --rounds 15 --output step.json --require-peers
    python benchmarks/train_step.py --published ../diffusion-data-constraint

All contestants have one network and the same weights, batches and optimizer. First each takes steps of learning rate 0
that score a few positions only, and loss and gradient norm must be those of our eager step: this also warms up and
compiles. Then every round times each of them, in an order that rotates, and each ratio is taken within a round.
A step is forward, backward, clipping, optimizer and zeroing the gradients; batches are prepared before.
"""

import os

# before torch is imported: one thread, and no accelerator
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import published
from benchmarks.contestants import PEERS, Contestant, Shape, missing, ours, version
from benchmarks.options import read_options, refuse
from megatron.batch import Batch
from megatron.config.flags import flag, require
from megatron.config.sections import ModelConfig, ObjectiveConfig, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.errors import ConfigurationError
from megatron.objectives import build_objective
from megatron.parallel.mesh import Processes, start_processes, stop_processes
from megatron.randomness import stream
from megatron.training.environment import device_name

LEARNING_RATE = 1e-4
INIT_STD = 0.1  # large enough that attention and MLP, not the embedding alone, decide the loss of a few positions
PROBES, PROBED = 3, 8  # steps of the check, and positions that each of them scores
TOLERANCE = {"loss": 1e-2, "gradient norm": 5e-2}  # relative, for bf16

# (contestant, how many times as fast, as which other)
GATES = (
    ("ours AR eager", 1.15, "litgpt AR eager"),
    ("ours AR eager", 1.30, "transformers AR eager"),
    ("ours AR compiled", 1.15, "litgpt AR eager"),
    ("ours AR compiled", 1.30, "transformers AR eager"),
    ("ours AR compiled", 1.00, "litgpt AR compiled"),
    ("ours AR compiled", 1.00, "transformers AR compiled"),
    ("ours MDM eager", 1.00, "ours AR eager"),
    ("ours MDM compiled", 1.00, "ours AR compiled"),
    ("ours MDM compiled", 2.00, "dllm MDM eager"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    num_layers: int = flag(6, "number of transformer blocks")
    hidden_size: int = flag(256, "width of the residual stream; the SwiGLU MLP has floor(8h/3/64)*64")
    num_attention_heads: int = flag(4, "number of heads")
    vocab_size: int = flag(GPT2_VOCABULARY, "ids of the tokenizer; [MASK] is added, then rows up to a multiple of 128")
    seq_length: int = flag(512, "tokens of one sample")
    micro_batch_size: int = flag(2, "samples of one step")
    rounds: int = flag(9, "rounds; one round times every contestant once")
    steps: int = flag(2, "steps of one contestant in a round")
    compile: bool = flag(True, "time the compiled contestants too")
    require_peers: bool = flag(False, "fail where a peer is not installed, instead of leaving it out")
    published: str | None = flag(
        None, f"folder of a clone of {published.REPOSITORY}; its model is timed beside ours", metavar="DIR"
    )
    output: str | None = flag(None, "write settings, versions, all times, ratios and gates as JSON", metavar="FILE")

    def __post_init__(self):
        for name in ("vocab_size", "seq_length", "micro_batch_size", "rounds", "steps"):
            value = getattr(self, name)
            require(value >= 1, name, value, "must be at least 1")
        tokens = self.micro_batch_size * self.seq_length
        require(tokens >= PROBED, "seq_length", self.seq_length, f"gives less than {PROBED} tokens a step; give more")
        if self.published is not None:
            obstacle = published.missing(self.published)
            require(obstacle is None, "published", self.published, obstacle)
        folder = Path(self.output or ".").parent
        require(folder.is_dir(), "output", self.output, f"{folder} is no folder; make it first")


def main() -> None:
    options = read_options(Options, __doc__)
    try:
        shape = shape_of(options)
        peers = installed_peers(options)
    except ConfigurationError as error:
        refuse(error)
    torch.set_num_threads(1)
    try:
        processes = start_processes()
        contestants = enter(shape, peers, options.compile, processes)
        if options.published is not None:
            contestants += published.contestants(shape, options.published, options.compile, processes)
        report = measure(options, contestants, shape)
    finally:
        stop_processes()
    print_report(report)
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def measure(options: Options, contestants: list[Contestant], shape: Shape) -> dict:
    check(contestants, probes(shape, options))
    return describe(options, compete(contestants, batches(shape, options, options.rounds * options.steps), options))


def shape_of(options: Options) -> Shape:
    names = ("num_layers", "hidden_size", "num_attention_heads")
    model = ModelConfig(**{name: getattr(options, name) for name in names}, init_method_std=INIT_STD)
    return Shape(model, Vocabulary(options.vocab_size), options.seq_length)


def installed_peers(options: Options) -> list[str]:
    """Return the peers that can run, with a line for each that cannot."""
    obstacles = {peer: missing(peer) for peer in PEERS}
    for peer, obstacle in obstacles.items():
        if obstacle and options.require_peers:
            raise ConfigurationError(f"--require-peers: {peer} cannot run, {obstacle}; see benchmarks/README.md")
        if obstacle:
            print(f"{peer}: skipped, {obstacle}")
    return [peer for peer, obstacle in obstacles.items() if not obstacle]


def enter(shape: Shape, peers: list[str], compiled: bool, processes: Processes) -> list[Contestant]:
    """Return all contestants; each has a model and an optimizer of its own."""
    contestants = []
    for compile in (False, True) if compiled else (False,):
        for objective in ("ar", "mdm"):
            contestants.append(Contestant("ours", objective, compile, ours(shape, compile, processes)))
        for peer in peers:
            objective, build = PEERS[peer]
            contestants.append(Contestant(peer, objective, compile, build(shape, compile)))
    return contestants


def batches(shape: Shape, options: Options, count: int, seed: int = 1) -> dict[str, list[Batch]]:
    """Return `count` training batches of every objective, made of the same random text."""
    size = options.micro_batch_size
    made = {}
    for name in ("ar", "mdm"):
        objective = build_objective(ObjectiveConfig(objective=name), shape.vocabulary, time_block=count * size)
        made[name] = []
        for first in range(0, count * size, size):
            text = stream(seed, "benchmark text", first)
            ids = text.integers(0, shape.vocabulary.size, (size, shape.seq_length + 1))
            made[name].append(objective.prepare(ids, range(first, first + size), seed))
    return made


def probes(shape: Shape, options: Options) -> dict[str, list[Batch]]:
    """Return batches of the full shape that score `PROBED` positions with weight 1.

    The mean over many positions of random text is much the same for any network; that over a few is not.
    """
    return {name: [_thinned(batch) for batch in made] for name, made in batches(shape, options, PROBES, seed=2).items()}


def _thinned(batch: Batch) -> Batch:
    places = torch.linspace(0, batch.weights.numel() - 1, PROBED).long()
    weights = torch.zeros(batch.weights.numel()).index_fill(0, places, 1.0).view_as(batch.weights)
    return Batch(batch.tokens, batch.targets, weights, np.full(len(weights), PROBED / len(weights)), batch.causal)


def check(contestants: list[Contestant], probes: dict[str, list[Batch]]) -> None:
    """Leave with an error unless all contestants of an objective give the loss and gradient norm of our eager step."""
    expected = {}
    for contestant in tqdm(contestants, "check and warm up", leave=False):
        found = [tuple(map(float, contestant.step(batch, 0.0))) for batch in probes[contestant.objective]]
        if contestant.dropout:  # what falls out is drawn anew at every step
            continue
        for want, have in zip(expected.setdefault(contestant.objective, found), found, strict=True):
            for (quantity, tolerance), x, y in zip(TOLERANCE.items(), want, have, strict=True):
                if not abs(x - y) <= tolerance * abs(x):
                    sys.exit(f"{contestant.name} computes something else: its {quantity} is {y:.5g}, ours {x:.5g}")
    losses = {objective: " ".join(f"{loss:.3f}" for loss, _ in found) for objective, found in expected.items()}
    print(f"check passed: same loss and gradient norm from the same weights (AR {losses['ar']}, MDM {losses['mdm']})")


def compete(contestants: list[Contestant], batches: dict[str, list[Batch]], options: Options) -> dict[str, list[float]]:
    """Return the CPU seconds of one step, by contestant and round."""
    times = {contestant.name: [] for contestant in contestants}
    with tqdm(total=options.rounds * len(contestants), desc="rounds", leave=False) as bar:
        for turn in range(options.rounds):
            shift = turn % len(contestants)
            for contestant in contestants[shift:] + contestants[:shift]:
                todo = batches[contestant.objective][turn * options.steps : (turn + 1) * options.steps]
                start = time.process_time()
                for batch in todo:
                    contestant.step(batch, LEARNING_RATE)
                times[contestant.name].append((time.process_time() - start) / options.steps)
                bar.update()
    return times


def describe(options: Options, times: dict[str, list[float]]) -> dict:
    """Return everything that the table and the JSON say."""
    gates = []
    for name, floor, other in GATES + published.gates(options.seq_length):
        if name in times and other in times:
            ratios = [theirs / own for own, theirs in zip(times[name], times[other], strict=True)]
            middle = median(ratios)
            gates.append({"contestant": name, "peer": other, "floor": floor, "median": middle, "ratios": ratios})
            gates[-1]["passed"] = middle >= floor
    return {
        "settings": asdict(options),
        "versions": {name: version(name) for name in ("torch", "transformers", "litgpt", "lightning", "deepspeed")},
        "python": platform.python_version(),
        "machine": device_name(torch.device("cpu")),
        "date": date.today().isoformat(),
        "seconds_per_step": times,
        "gates": gates,
    }


def print_report(report: dict) -> None:
    settings, times = report["settings"], report["seconds_per_step"]
    tokens = settings["micro_batch_size"] * settings["seq_length"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    print(f"{report['date']}, {report['machine']}, one thread, bf16; {versions}\n")
    print("| contestant | ms a step | min - max | tokens a CPU second |\n|---|---|---|---|")
    for name, seconds in times.items():
        low, middle, high = (1000 * value for value in (min(seconds), median(seconds), max(seconds)))
        print(f"| {name} | {middle:.1f} | {low:.1f} - {high:.1f} | {1000 * tokens / middle:.0f} |")
    print("\n| gate | times as fast | min - max | at least | |\n|---|---|---|---|---|")
    for gate in report["gates"]:
        low, high, verdict = min(gate["ratios"]), max(gate["ratios"]), "pass" if gate["passed"] else "FAIL"
        pair = f"{gate['contestant']} : {gate['peer']}"
        print(f"| {pair} | {gate['median']:.2f} | {low:.2f} - {high:.2f} | {gate['floor']:.2f} | {verdict} |")


if __name__ == "__main__":
    main()
