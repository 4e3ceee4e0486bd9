#!/usr/bin/env python3
"""Facts of the published experiments (2507.15857) for the example scripts.

    python examples_scaling/lib/published.py size ar 1e19
    python examples_scaling/lib/published.py data-value mdm 1e19 4
    python examples_scaling/lib/published.py cost 99952399 --model-size 140M --train-epochs 50

size: the compute-optimal model size of an objective at a training compute. data-value: that size, and the unique tokens
of the subset that is read for so many epochs at that compute. cost: the FLOPs (6ND) and GPU-hours of a training run on
so many unique tokens, on H100s at 40% of their bf16 peak; flags that do not matter for them are ignored.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.config.flags import DescribedFormatter, Parser, spelling
from megatron.config.sections import ModelConfig
from megatron.config.sizes import (
    COMPUTE_OPTIMAL,
    DATA_VALUE_EPOCHS,
    DATA_VALUE_TOKENS,
    GPT2_VOCABULARY,
    ladder_settings,
    parameter_count,
)
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError

SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels")
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
    cost.add_argument("unique_tokens", type=float)
    cost.add_argument("--model-size", required=True)
    for name in SHAPE:
        cost.add_argument(spelling(name), type=int)
    for name in ("--train-unique-tokens", "--train-epochs", "--train-flops"):
        cost.add_argument(name, type=float)
    try:
        print(answer(parser.parse_some(sys.argv[1:])[0]), end="")
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


def answer(options: argparse.Namespace) -> str:
    """Return the line of a command.

    Raises: ConfigurationError where nothing is published.
    """
    if options.command == "cost":
        return cost_line(options)
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


def cost_line(options: argparse.Namespace) -> str:
    """Return a comment with parameters N, tokens D, 6ND and GPU-hours; the embedding is counted once."""
    shape = {name: getattr(options, name) for name in SHAPE if getattr(options, name) is not None}
    model = ModelConfig(**{**ladder_settings(options.model_size), **shape})
    parameters = parameter_count(model, Vocabulary(GPT2_VOCABULARY))
    tokens = (options.train_epochs or 0) * (options.train_unique_tokens or options.unique_tokens)
    flops = options.train_flops or 6 * parameters * tokens
    hours = flops / (MFU * PEAK) / 3600
    tokens = flops / (6 * parameters)
    return (
        f"# N {parameters / 1e6:.1f}M, D {tokens:.4g} tokens, 6ND = {flops:.3g} FLOPs: {hours:,.2f} GPU-hours of H100 "
        f"at {MFU:.0%} of {PEAK / 1e12:.0f} TFLOP/s\n"
    )


if __name__ == "__main__":
    main()
