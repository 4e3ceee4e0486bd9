#!/usr/bin/env python3
"""Facts of the published experiments (2507.15857) for the example scripts.

    python examples_scaling/lib/published.py size ar 1e19
    python examples_scaling/lib/published.py data-value mdm 1e19 4
    python examples_scaling/lib/published.py cost ar 99952399 --model-size 140M --train-epochs 50

size: the compute-optimal model size of an objective at a training compute. data-value: that size, and the unique tokens
of the subset that is read for so many epochs at that compute. cost: the FLOPs (6ND) and GPU-hours of a training run on
so many unique tokens of GPT-2's vocabulary, on H100s at 40% of their bf16 peak; the flags are those of the run.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.config.flags import DescribedFormatter, Parser, spelling, typed_flags
from megatron.config.resolve import resolve
from megatron.config.sections import SECTIONS, ModelConfig
from megatron.config.sizes import COMPUTE_OPTIMAL, GPT2_VOCABULARY, ladder_settings, parameter_count
from megatron.config.subsets import DATA_VALUE_EPOCHS, DATA_VALUE_TOKENS
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError

DATA_FLAGS = {"--train-data-path", "--train-data-path-file"}
# flags that change neither parameters nor tokens; with others the training parser, which imports torch, is needed
WITHOUT_COST = {"--recipe", "--seed", "--micro-batch-size", "--vocab-file", "--merge-file", "--attention-dropout"}
WITHOUT_COST |= {"--randmask-ratio", "--num-order-list", "--use-predefined-order", "--ar-ratio", *DATA_FLAGS}
WITHOUT_COST |= {"--valid-data-path", "--valid-data-path-file"}
WITHOUT_COST |= {
    spelling(field.name)
    for name in ("optimizer", "validation", "checkpoint", "tracking", "parallel")
    for field in fields(SECTIONS[name])
}
MFU, PEAK = 0.4, 989e12  # assumed share of the dense bf16 peak of an H100 SXM, in FLOP/s


def main() -> None:
    """Run the command."""
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("size", "objective flops"), ("data-value", "objective flops epochs")):
        command = commands.add_parser(name)
        for word in words.split():
            command.add_argument(word)
    cost = commands.add_parser("cost")
    cost.add_argument("objective")
    cost.add_argument("unique_tokens", type=int)
    cost.add_argument("flags", nargs=argparse.REMAINDER)
    try:
        print(answer(parser.parse_some(sys.argv[1:])[0]), end="")
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


def answer(options: argparse.Namespace) -> str:
    """Return the line of a command.

    Raises: ConfigurationError where nothing is published, and for wrong flags of a run.
    """
    if options.command == "cost":
        return cost_line(options.objective, options.unique_tokens, options.flags)
    budgets = {
        f"{flops:.0e}".replace("+", ""): flops for objective, flops in COMPUTE_OPTIMAL if objective == options.objective
    }
    if not budgets:
        raise ConfigurationError(f"OBJECTIVE={options.objective}: is neither ar nor mdm; give one of them")
    if options.flops not in budgets:
        remedy = f"give {'SIZE, or ' if options.command == 'size' else ''}one of {', '.join(budgets)}"
        raise ConfigurationError(f"FLOPS={options.flops}: no compute-optimal size is published for it; {remedy}")
    point = (options.objective, budgets[options.flops])
    if options.command == "size":
        return f"{COMPUTE_OPTIMAL[point]}\n"
    subsets = {
        str(epochs): tokens
        for epochs, tokens in zip(DATA_VALUE_EPOCHS, DATA_VALUE_TOKENS[point], strict=True)
        if tokens
    }
    if options.epochs not in subsets:
        raise ConfigurationError(
            f"EPOCHS={options.epochs}: no subset is published for it; give one of {', '.join(subsets)}"
        )
    return f"{COMPUTE_OPTIMAL[point]} {subsets[options.epochs]}\n"


def cost_line(objective: str, unique_tokens: int, flags: list[str]) -> str:
    """Return a comment with parameters N, tokens D, 6ND and GPU-hours; the embedding is counted once.

    `unique_tokens` are those of the first data flag; where a later one replaces it, D is unknown.

    Raises: ConfigurationError for flags that the training command refuses.
    """
    parameters, tokens, flops = _cost_of_ladder(unique_tokens, flags) or _cost(objective, unique_tokens, flags)
    data = [flag for flag in flags if flag.split("=")[0] in DATA_FLAGS]
    if len(data) > 1 and "--train-epochs" in typed_flags(flags):
        return f"# N {parameters / 1e6:.1f}M; D and cost are unknown: {data[-1]} replaces the data of the script\n"
    return (
        f"# N {parameters / 1e6:.1f}M, D {tokens:.4g} tokens, 6ND = {flops:.3g} FLOPs: "
        f"{flops / (MFU * PEAK) / 3600:,.2f} GPU-hours of H100 at {MFU:.0%} of {PEAK / 1e12:.0f} TFLOP/s\n"
    )


def _cost_of_ladder(unique_tokens: int, flags: list[str]) -> tuple[int, float, float] | None:
    """Return N, D and 6ND of a model of the ladder; None if another flag may change them."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-size", required=True)
    for name in ("--train-unique-tokens", "--train-epochs", "--train-flops"):
        parser.add_argument(name, type=float)
    options, others = parser.parse_some(flags)
    budgets = (options.train_epochs, options.train_flops)
    if not typed_flags(others) <= WITHOUT_COST or budgets.count(None) != 1:
        return None
    parameters = parameter_count(ModelConfig(**ladder_settings(options.model_size)), Vocabulary(GPT2_VOCABULARY))
    if options.train_epochs is None:
        return parameters, options.train_flops / (6 * parameters), options.train_flops
    tokens = options.train_epochs * (options.train_unique_tokens or unique_tokens)
    return parameters, tokens, 6 * parameters * tokens


def _cost(objective: str, unique_tokens: int, flags: list[str]) -> tuple[int, float, float]:
    """Return N, D and 6ND of a run as the training parser resolves it.

    Raises: ConfigurationError for flags that the training command refuses.
    """
    from megatron.objectives.registry import capabilities
    from megatron.training.command_line import parse

    config = parse(objective, flags)
    unique_tokens = config.data.train_unique_tokens or unique_tokens
    plan = resolve(config, Vocabulary(GPT2_VOCABULARY), unique_tokens, capabilities(config.objective.objective))
    run = (plan.train_samples, config.data.seq_length)
    return plan.parameters, plan.tokens(*run), plan.flops(*run)


if __name__ == "__main__":
    main()
