#!/usr/bin/env python3
"""Compare the cost of likelihoods of a window with theory, and the throughput of unmasking policies with the bound's.

    OMP_NUM_THREADS=1 python benchmarks/likelihoods/run.py --output likelihoods.json
    python benchmarks/likelihoods/run.py --device cuda --model-size 140M --seq-length 1024 --windows 16

A model of the ladder with random weights, in fp32 on a CPU and bf16 on CUDA, on windows of random tokens. For each
objective, forward tokens of a window are counted at the embedding and compared with the formula of the policy. The
bound has as many Monte-Carlo samples as a chain has forward passes, so both have the same forward tokens. The table
gives forward tokens per second, relative to the bound's in the same round. A pass should have a thousand positions or
more: on a CPU the head of the bound works on chunks of 256 scored positions.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

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
from megatron.config.flags import flag, require
from megatron.config.policies import ORDERS
from megatron.config.sections import ObjectiveConfig
from megatron.config.sizes import GPT2_VOCABULARY, ladder_model
from megatron.config.vocabulary import Vocabulary
from megatron.generation.sampling import Sampling
from megatron.likelihoods.chains import Chains, chains_of, with_steps
from megatron.likelihoods.mixture import MixtureEngine
from megatron.likelihoods.windows import PolicyEngine, WholeWindows
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise, Likelihood
from megatron.objectives.registry import OBJECTIVES, build_objective
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel

POLICIES = ("left-to-right", "confidence", "margin", "entropy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    model_size: str = flag("7M", "a size of the ladder", metavar="NAME")
    vocab_size: int = flag(GPT2_VOCABULARY, "token ids")
    objectives: tuple[str, ...] = flag(("mdm", "dual", "any-order", "block-diffusion"), "which ones", metavar="NAME")
    orders: tuple[str, ...] = flag(POLICIES, "orders of chains", choices=ORDERS)
    seq_length: int = flag(32, "tokens of a window")
    windows: int = flag(32, "windows of a forward pass")
    tokens_per_step: int = flag(1, "tokens that a step of a chain unmasks", metavar="K")
    num_orders: int = flag(2, "random orders of iwae, an even number; 0 leaves it out", metavar="K")
    diffusion_block_size: int = flag(16, "tokens of a block of block diffusion")
    rounds: int = flag(3, "how often each likelihood is timed")
    device: str = flag("cpu", "where", choices=("cpu", "cuda"))
    output: str | None = output_flag()

    def __post_init__(self):
        positive = ("seq_length", "windows", "tokens_per_step", "diffusion_block_size", "rounds")
        require_positive(self, positive)
        even = self.num_orders >= 0 and self.num_orders % 2 == 0
        require(even, "num_orders", self.num_orders, "is an even number, or 0")
        for name in self.objectives:
            require(name in OBJECTIVES, "objectives", name, f"is not one of {', '.join(OBJECTIVES)}")


@dataclass(frozen=True)
class Contestant:
    """A likelihood of the windows: what evaluates it once, and the forward tokens of a window by theory."""

    evaluate: Callable[[], object]
    forward_tokens: float


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    ranks = replace(initialize_parallel(), device=torch.device(options.device))
    vocabulary = Vocabulary(options.vocab_size)
    model = Shape(ladder_model(options.model_size), vocabulary, options.seq_length).ours()
    model = model.to(ranks.device, torch.bfloat16 if options.device == "cuda" else torch.float32).eval()
    report = {"environment": environment(ranks.device), "settings": vars(options), "objectives": {}}
    for name in options.objectives:
        report["objectives"][name] = measure(options, model, name, ranks)
    destroy_parallel()
    publish(report, tables(report), options.output)


def measure(options: Options, model: Transformer, name: str, ranks: ParallelContext) -> dict:
    """Return forward tokens and throughput of every likelihood of an objective, by name."""
    contestants = dict(likelihoods(options, model, name, ranks))
    counted = {likelihood: count_tokens(model, entry.evaluate) for likelihood, entry in contestants.items()}

    def run(likelihood: str, turn: int) -> None:
        contestants[likelihood].evaluate()

    calls = {likelihood: partial(run, likelihood) for likelihood in contestants}
    seconds = interleave(calls, options.rounds, ranks.device, warm_up=1).seconds
    per_token = {likelihood: [time / counted[likelihood] for time in times] for likelihood, times in seconds.items()}
    return {
        likelihood: {
            "forward_tokens": counted[likelihood] / options.windows,
            "theory": entry.forward_tokens,
            "tokens_per_second": summary([1 / time for time in per_token[likelihood]]),
            "relative_throughput": ratios(per_token["bound"], per_token[likelihood]),
        }
        for likelihood, entry in contestants.items()
    }


def likelihoods(
    options: Options, model: Transformer, name: str, ranks: ParallelContext
) -> Iterator[tuple[str, Contestant]]:
    """Yield the bound of an objective, and each policy, by name."""
    config = ObjectiveConfig(objective=name)
    if "diffusion_block_size" in OBJECTIVES[name].options:
        config = replace(config, diffusion_block_size=options.diffusion_block_size)
    objective = build_objective(config, model.vocabulary, time_block=2)
    random = np.random.default_rng(0)
    ids = random.integers(0, model.vocabulary.size, (options.windows, options.seq_length + 1))
    for likelihood in objective.likelihoods:
        chains = chains_of(likelihood, model)
        if chains is None:
            continue
        bound = partial(evaluate_bound, model, likelihood, ids, device=ranks.device)
        width = OBJECTIVES[name].capabilities.positions_per_token * options.seq_length
        size = chains.num_ordered(options.seq_length - 1)
        replicates = with_steps(Sampling(), options.tokens_per_step, size).steps or size
        yield "bound", Contestant(partial(bound, replicates), replicates * width)
        batch = WholeWindows(likelihood).evaluation(
            ids, EvaluationNoise(1, "windows", 0), np.arange(len(ids)), "common"
        )
        for order in options.orders:
            sampling = with_steps(Sampling(order=order), options.tokens_per_step, size)
            engine = PolicyEngine(chains, ranks, sampling)
            yield f"chain, {order}", Contestant(partial(engine.nll, batch), policy_tokens(options, chains, sampling))
        if not options.num_orders:
            continue
        sampling = Sampling(order="random", seed=1)
        engine = MixtureEngine(chains, ranks, sampling, orders=options.num_orders)
        tokens = options.num_orders * policy_tokens(options, chains, sampling)
        yield f"iwae, {options.num_orders} orders", Contestant(partial(engine.nll, batch), tokens)


def policy_tokens(options: Options, chains: Chains, sampling: Sampling) -> float:
    """Return the forward tokens of a window of S tokens by theory.

    masked diffusion   steps x S
    block diffusion    steps of a block x 2S: all blocks in one pass, with their text
    any order          S - 1 in one pass; where predictions decide the order or a step has several tokens, S - 1 for
                       each step: the inputs read before, and a query for each token that is left
    """
    length, num_masked = options.seq_length, options.seq_length - 1
    steps = sampling.steps or chains.num_ordered(num_masked)
    if chains.passes(Sampling(order="left-to-right"), num_masked) == 1 < num_masked:  # any order
        return chains.passes(sampling, num_masked) * num_masked
    return steps * (length if chains.num_ordered(num_masked) == num_masked else 2 * length)


@torch.no_grad()
def evaluate_bound(
    model: Transformer, likelihood: Likelihood, ids: np.ndarray, replicates: int, *, device: torch.device
) -> None:
    """Evaluate the bound of windows as validation does."""
    for replicate in range(replicates):
        batch = likelihood.evaluation(ids, EvaluationNoise(1, "windows", replicate), np.arange(len(ids)), "common")
        model(batch.to(device), per_position=True).cpu()


def count_tokens(model: Transformer, evaluate: Callable[[], object]) -> int:
    """Return the tokens that an evaluation embeds."""
    counts = []
    hook = model.embed_tokens.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].numel()))
    evaluate()
    hook.remove()
    return sum(counts)


def tables(report: dict) -> str:
    """Return the report as a Markdown table."""
    rows = []
    for name, results in report["objectives"].items():
        for likelihood, result in results.items():
            throughput = spread(result["relative_throughput"])
            tokens = (f"{result['forward_tokens']:,.0f}", f"{result['theory']:,.0f}")
            speed = f"{result['tokens_per_second']['median']:,.0f}"
            rows.append((name, likelihood, *tokens, speed, *throughput))
    columns = ("objective", "likelihood", "forward tokens of a window", "theory", "tokens/s", "relative to the bound")
    return markdown_table((*columns, "min - max"), rows)


if __name__ == "__main__":
    main()
