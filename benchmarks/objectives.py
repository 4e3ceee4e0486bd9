#!/usr/bin/env python3
"""Time a training step of every objective and regulariser beside plain AR, and beside what its arithmetic explains.

    python benchmarks/objectives.py --output objectives.json

Noise and batches are made within the step, as a run without loader processes does. Every round times one step of each,
in an order that rotates; a ratio is taken within a round, and the table gives the median: of CPU time on the CPU.
"explained" counts matrix products: passes and positions, attention over all or half of the square, the head at the
scored positions only.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from benchmarks.contestants import Shape, version
from benchmarks.options import read_options
from benchmarks.work import linears
from megatron.batch import Batch
from megatron.config.flags import flag, require
from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY, parameter_count
from megatron.objectives import build_input_noise, build_objective, document_rules
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training.averaging import start_average
from megatron.training.build_engine import start_engine
from megatron.training.command_line import parse
from megatron.training.environment import choose_precision, device_name
from megatron.training.microbatches import MicroBatches
from megatron.training.step import reseed, train_step
from megatron.training.step_benchmark import RandomText

WARM_UP = 2  # rounds that are not timed
VOCABULARY, EOD = Vocabulary(GPT2_VOCABULARY), GPT2_VOCABULARY - 1
PLAIN = "--objective ar"
CASES = [
    PLAIN,
    "--objective mdm",
    "--objective dual",
    "--objective any-order",
    "--objective block-diffusion",
    "--objective mdm --ar-ratio 0.5",
    "--num-order-list 10",
    "--right-to-left-ratio 0.5",
    "--target-offset-max 5 --target-positions",
    "--token-dropout-max 0.3",
    "--random-replacement 0.15",
    "--masked-input-weight 0.4",
    "--randmask-ratio 0.3",
    "--stochastic-depth 0.1",
    "--reset-attention-mask --reset-position-ids --eod-mask-loss",
    "--attention-dropout 0.1",
    "--hidden-dropout 0.1",
    "--mlp-dropout 0.1",
    "--label-smoothing 0.1",
    "--z-loss 1e-4",
    "--optimizer muon",
    "--ema-decay 0.999",
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained."""

    model_size: str = flag("7M", "a size of the ladder", metavar="NAME")
    seq_length: int = flag(512, "tokens of one sample")
    micro_batch_size: int = flag(2, "samples of one micro-batch; a step has two")
    rounds: int = flag(9, f"steps of each that are timed, after {WARM_UP} that are not")
    compile: bool = flag(False, "compile the blocks")
    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")

    def __post_init__(self):
        for name in ("seq_length", "micro_batch_size", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


class Contestant:
    """One option, with a model and an optimizer of its own."""

    def __init__(self, flags: str, options: Options, ranks: ParallelContext):
        batch = 2 * options.micro_batch_size
        base = f"--model-size {options.model_size} --seq-length {options.seq_length} --train-iters 1 "
        base += f"--micro-batch-size {options.micro_batch_size} --global-batch-size {batch} --train-data-path none "
        self.flags, self.config = flags, parse("ar", (base + flags).split())
        self.clock = time.process_time if ranks.device.type == "cpu" else time.perf_counter
        config, self.ranks = self.config, ranks
        bf16 = choose_precision(config, ranks.device) == "bf16"
        self.engine, self.optimizer = start_engine(
            config, VOCABULARY, ranks, bf16=bf16, compile=options.compile, steps=0
        )
        self.average = start_average(self.engine, config.optimizer, None)
        rules = document_rules(config.data, config.objective, EOD)
        self.data = MicroBatches(
            RandomText(VOCABULARY.size, options.seq_length),
            build_objective(config.objective, VOCABULARY, batch, rules),
            build_input_noise(config.objective, VOCABULARY, config.model.num_layers),
            seed=1,
            first_sample=0,
            train_samples=(WARM_UP + options.rounds) * batch,
            micro_batch_size=options.micro_batch_size,
            global_batch_size=batch,
            rank=0,
            size=1,
        )
        self.seconds, self.explained = [], []

    def step(self, number: int) -> None:
        """Take a step and note what it took, and the products that it asked for."""
        reseed(1, number, self.ranks)
        begin = self.clock()
        batches = [batch for index in range(2) for batch in self.data[2 * number + index]]
        result = train_step(self.engine, self.optimizer, batches, learning_rate=1e-4, weight_decay=0.1, clip_grad=1.0)
        if self.average:
            self.average.update(number)
        float(result.loss)  # waits for the device
        self.seconds.append(self.clock() - begin)
        self.explained.append(sum(products(self.config, batch) for batch in batches))


def products(config: Config, batch: Batch) -> float:
    """Return the multiplications of one forward pass of a batch."""
    model, positions = config.model, batch.tokens.numel()
    seen = batch.tokens.shape[1] / (2 if batch.causal and batch.blocked is None and batch.documents is None else 1)
    attention = 2 * model.num_layers * model.num_attention_heads * model.head_size * seen
    shape = Shape(model, VOCABULARY, config.data.seq_length)
    layers = sum(
        count * inputs * outputs for count, inputs, outputs in linears(shape, positions, len(batch.scored_positions))
    )
    return positions * attention + layers


def main() -> None:
    options = read_options(Options, __doc__)
    ranks = initialize_parallel()
    try:
        report = compete(options, ranks)
    finally:
        destroy_parallel()
    print(table(report))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def compete(options: Options, ranks: ParallelContext) -> dict:
    """Return what every contestant took, and its ratio to plain AR, measured and explained."""
    contestants = [Contestant(flags, options, ranks) for flags in CASES]
    for number in tqdm(range(WARM_UP + options.rounds), unit="round", disable=not sys.stderr.isatty()):
        turn = number % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            contestant.step(number)
    (plain,) = [each for each in contestants if each.flags == PLAIN]
    return {
        "date": str(date.today()),
        "device": device_name(ranks.device),
        "precision": choose_precision(plain.config, ranks.device),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "settings": vars(options) | {"parameters": parameter_count(plain.config.model, VOCABULARY)},
        "results": {each.flags: _result(each, plain) for each in contestants},
    }


def _result(contestant: Contestant, plain: Contestant) -> dict:
    timed = np.array(contestant.seconds[WARM_UP:])
    ratios = timed / np.array(plain.seconds[WARM_UP:])
    return {
        "seconds_per_step": median(timed),
        "tokens_per_second": contestant.data.global_batch_size * contestant.data.samples.seq_length / median(timed),
        "times_plain": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "explained": sum(contestant.explained[WARM_UP:]) / sum(plain.explained[WARM_UP:]),
    }


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    lines = ["| flags | ms a step | tokens/s | times plain AR | min - max | explained |", "|---|---|---|---|---|---|"]
    for flags, found in report["results"].items():
        lines.append(
            f"| `{flags}` | {1000 * found['seconds_per_step']:.0f} | {found['tokens_per_second']:.0f} | "
            f"{found['times_plain']:.2f} | {found['lowest']:.2f} - {found['highest']:.2f} | {found['explained']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
