#!/usr/bin/env python3
"""Print the published ladder of model sizes with parameter counts, and the papers' budgets.

    python tools/sizes.py
    python tools/sizes.py --train-flops 1e19 --unique-tokens C4-500M

With --train-flops it adds the tokens, and the epochs over --unique-tokens, of that compute at each size. Names of
published subsets are also values of --train-unique-tokens of a training run.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.config.flags import DescribedFormatter, Parser, parse_number, require
from megatron.config.sizes import (
    BEST_ON_100M,
    COMPUTE_OPTIMAL,
    GPT2_VOCABULARY,
    LADDER,
    ladder_model,
    non_embedding_count,
    parameter_count,
    published_count,
)
from megatron.config.subsets import (
    DATA_VALUE_EPOCHS,
    DATA_VALUE_FAMILIES,
    SUBSETS,
    UNIQUE_TOKENS,
    TokenCount,
    subset_name,
)
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError


def main() -> None:
    """Print the ladder and the budgets."""
    parser = Parser(description=__doc__, formatter_class=DescribedFormatter, allow_abbrev=False)
    parser.add_argument("--train-flops", type=partial(parse_number, float), metavar="C", help="training compute, 6ND")
    parser.add_argument(
        "--unique-tokens",
        type=TokenCount,
        default="C4-100M",
        metavar="N",
        help="unique tokens: a number or a published subset (default: C4-100M)",
    )
    try:
        options = parser.parse_known(sys.argv[1:])
        for name in ("train_flops", "unique_tokens"):
            value = getattr(options, name)
            require(value is None or value > 0, name, value, "must be positive; change it")
        print_ladder(options.train_flops, options.unique_tokens)
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    print_budgets()


def print_ladder(flops: float | None, unique_tokens: int) -> None:
    """Print one line per size: shape, three parameter counts in millions, and tokens and epochs of `flops`."""
    vocabulary = Vocabulary(GPT2_VOCABULARY)
    head = f"{'size':>7}{'layers':>8}{'hidden':>8}{'heads':>7}{'head':>6}{'MLP':>7}"
    head += f"{'N':>11}{'no embed':>11}{'published':>11}"
    print(head + (f"{'tokens':>10}{'epochs':>10}" if flops else ""))
    for name in LADDER:
        model = ladder_model(name)
        counts = (parameter_count(model, vocabulary), non_embedding_count(model, vocabulary), published_count(model))
        line = f"{name:>7}{model.num_layers:>8}{model.hidden_size:>8}{model.num_attention_heads:>7}{model.head_size:>6}"
        line += f"{model.mlp_size:>7}" + "".join(f"{count / 1e6:>10.1f}M" for count in counts)
        if flops:
            tokens = flops / (6 * counts[0])
            line += f"{tokens:>10.2e}{tokens / unique_tokens:>10.1f}"
        print(line)
    print("N: all parameters, the embedding (padded to 50304 rows) once; published: as the papers' scripts count.\n")


def print_budgets() -> None:
    """Print the published budgets and best runs."""
    print("Best size by training FLOPs (2507.15857):")
    for (objective, flops), name in COMPUTE_OPTIMAL.items():
        print(f"  {objective.upper():4}{flops:.0e}  {name}")
    print("Best published runs on 100M unique tokens:")
    for objective, (name, epochs, loss) in BEST_ON_100M.items():
        print(f"  {objective.upper():4}{name} x {epochs} epochs, validation loss {loss}")
    print("\nPublished subsets, in tokens: the first documents of C4 and SlimPajama")
    for name in UNIQUE_TOKENS:
        subset = subset_name(name)
        print(f"  {subset:<16}{SUBSETS[subset]:>15,}")
    print("\nSubsets of C4 for equal compute, in tokens: to read once, or for the number of epochs in the name")
    for (objective, flops), family in DATA_VALUE_FAMILIES.items():
        print(f"  {objective.upper()} at {flops:.0e}")
        for epochs in DATA_VALUE_EPOCHS:
            subset = subset_name(family, epochs)
            if subset in SUBSETS:
                print(f"  {subset:<16}{SUBSETS[subset]:>15,}")


if __name__ == "__main__":
    stop_signals.run_tool(main)
