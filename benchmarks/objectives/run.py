#!/usr/bin/env python3
"""Time a training step of every objective and regulariser relative to plain AR, and compare with the ratio of FLOPs.

    python benchmarks/objectives/run.py --output objectives.json

Noise and batches are prepared within the step, as in a run with --num-workers 0. Every round times one step of each
case, in a rotating order. Ratios are taken within a round, and the table gives their median; times are CPU time on a
CPU. "explained" is the ratio of matrix-product FLOPs: forward passes and positions, full or causal (half) attention,
the head at scored positions only.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import (
    environment,
    interleave,
    markdown_table,
    output_flag,
    publish,
    ratios,
    read_options,
    require_positive,
    spread,
    summary,
)
from benchmarks.training_step.implementations import Shape
from benchmarks.training_step.work import linears
from megatron.batch import Batch
from megatron.config.flags import flag
from megatron.config.sections import Config
from megatron.config.sizes import GPT2_VOCABULARY, parameter_count
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective, document_rules
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.parallel.meta_gradient import MetaGradient
from megatron.training.averaging import start_average
from megatron.training.build_engine import start_engine
from megatron.training.command_line import parse
from megatron.training.environment import choose_precision
from megatron.training.microbatches import MicroBatches
from megatron.training.step import reseed, train_step
from megatron.training.step_benchmark import RandomText

WARM_UP = 2  # untimed rounds
VOCABULARY, EOD = Vocabulary(GPT2_VOCABULARY), GPT2_VOCABULARY - 1
PLAIN = "--objective ar"
CASES = [
    PLAIN,
    "--objective mdm",
    "--objective dual",
    "--objective any-order",
    "--objective block-diffusion",
    "--objective mdm --ar-ratio 0.5",
    "--objective mdm --mask-time-distribution bell",
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
    "--parametrization completep --base-hidden-size 64 --base-num-layers 1",
    "--ema-decay 0.999",
    "--meta-gradient-norm 0.5",
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark and of `benchmarks/distillation`."""

    model_size: str = flag("7M", "a size of the ladder", metavar="NAME")
    seq_length: int = flag(512, "tokens per sample")
    micro_batch_size: int = flag(2, "samples per micro-batch; a step has two micro-batches")
    rounds: int = flag(9, f"timed steps of each case, after {WARM_UP} warm-up steps")
    compile: bool = flag(False, "compile the blocks")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("seq_length", "micro_batch_size", "rounds"))


class Case:
    """One row of the table: its configuration, model, optimizer and data."""

    def __init__(self, flags: str, options: Options, ranks: ParallelContext):
        global_batch_size = 2 * options.micro_batch_size
        base = f"--model-size {options.model_size} --seq-length {options.seq_length} --train-iters 1 "
        base += f"--micro-batch-size {options.micro_batch_size} --global-batch-size {global_batch_size} "
        base += "--train-data-path none "
        self.flags = flags
        self.config = config = parse("ar", (base + flags).split())
        self.ranks = ranks
        bf16 = choose_precision(config, ranks.device) == "bf16"
        self.engine, self.optimizer = start_engine(
            config, VOCABULARY, ranks, bf16=bf16, compile=options.compile, steps=0
        )
        self.average = start_average(self.engine, config.optimizer, None)
        rules = document_rules(config.data, config.objective, EOD)
        self.data = MicroBatches(
            RandomText(VOCABULARY.size, options.seq_length),
            build_objective(config.objective, VOCABULARY, global_batch_size, rules),
            build_input_noise(config.objective, VOCABULARY, config.model.depth),
            seed=1,
            first_sample=0,
            train_samples=(WARM_UP + options.rounds) * global_batch_size,
            micro_batch_size=options.micro_batch_size,
            global_batch_size=global_batch_size,
            rank=0,
            size=1,
        )
        self.multiplications: list[float] = []  # of the forward passes, by step

    def step(self, iteration: int) -> None:
        """Take a step and record its multiplications."""
        reseed(1, iteration, self.ranks)
        batches = [batch for index in range(2) for batch in self.data[2 * iteration + index]]
        meta_gradient = MetaGradient.at(self.config.optimizer, self.config.optimizer.lr)
        rates = {"learning_rate": 1e-4, "weight_decay": 0.1, "meta_gradient": meta_gradient}
        train_step(self.engine, self.optimizer, batches, **rates, clip_grad=1.0)
        if self.average:
            self.average.update(iteration)
        self.multiplications.append(sum(multiplications(self.config, batch) for batch in batches))


def multiplications(config: Config, batch: Batch) -> float:
    """Return the multiplications of one forward pass of a batch, matrix products and attention only."""
    model = config.model
    positions = batch.tokens.numel()
    halved = batch.causal and batch.blocked is None and batch.documents is None
    keys_per_query = batch.tokens.shape[1] / (2 if halved else 1)
    attention = 2 * model.depth * model.num_attention_heads * model.head_size * keys_per_query
    shape = Shape(model, VOCABULARY, config.data.seq_length)
    linear_layers = sum(
        count * inputs * outputs for count, inputs, outputs in linears(shape, positions, len(batch.scored_positions))
    )
    return positions * attention + linear_layers


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    ranks = initialize_parallel()
    try:
        report = compete(options, ranks)
    finally:
        destroy_parallel()
    publish(report, table(report), options.output)


def compete(options: Options, ranks: ParallelContext) -> dict:
    """Return the report: the time of every case, and its ratio to plain AR, measured and explained."""
    cases = [Case(flags, options, ranks) for flags in CASES]
    contestants = {case.flags: case.step for case in cases}
    seconds = interleave(contestants, options.rounds, ranks.device, warm_up=WARM_UP).seconds
    (plain,) = [case for case in cases if case.flags == PLAIN]
    return {
        "environment": environment(ranks.device),
        "precision": choose_precision(plain.config, ranks.device),
        "settings": vars(options) | {"parameters": parameter_count(plain.config.model, VOCABULARY)},
        "results": {case.flags: _result(case, plain, seconds) for case in cases},
    }


def _result(case: Case, plain: Case, seconds: dict[str, list[float]]) -> dict:
    times = seconds[case.flags]
    return {
        "seconds": times,
        "tokens_per_second": case.data.global_batch_size * case.data.samples.seq_length / median(times),
        "times_plain": summary(ratios(times, seconds[plain.flags])),
        "explained": sum(case.multiplications[WARM_UP:]) / sum(plain.multiplications[WARM_UP:]),
    }


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    results = report["results"]
    rows = []
    for flags, result in results.items():
        speed = (f"{1000 * median(result['seconds']):.0f}", f"{result['tokens_per_second']:.0f}")
        compared = spread(ratios(result["seconds"], results[PLAIN]["seconds"]))
        rows.append((f"`{flags}`", *speed, *compared, f"{result['explained']:.2f}"))
    columns = ("flags", "ms/step", "tokens/s", "time / plain AR", "min - max", "explained")
    return f"{report['precision']}\n\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    main()
