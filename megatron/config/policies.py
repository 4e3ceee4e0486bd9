"""Flags of likelihoods of masked models: the bound, an unmasking policy, or a bound from several random orders."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag, require

ORDERS = ("confidence", "margin", "entropy", "random", "left-to-right", "right-to-left")
CERTAINTIES = ("confidence", "margin", "entropy")  # orders that depend on predictions
LIKELIHOODS = ("bound", "chain", "iwae")


@dataclass(frozen=True, kw_only=True)
class LikelihoodFlags(Section):
    """Which likelihood of a model that predicts masked tokens, or tokens in any order."""

    likelihood: str | None = flag(
        None,
        "masked models; bound: the mean over all orders of the tokens; chain: exact under an unmasking policy; iwae: "
        "the importance-weighted bound of --num-orders random orders (default: exact from left to right where a model "
        "has that, else bound)",
        choices=LIKELIHOODS,
    )
    chain_order: str = flag("left-to-right", "the order of unmasking", choices=ORDERS, needs="likelihood chain")
    tokens_per_step: int = flag(1, "unmask K tokens a step", metavar="K", within="[1, inf)", needs="likelihood chain")
    block_length: int | None = flag(
        None,
        "unmask blocks of N tokens from left to right (default: a single block)",
        metavar="N",
        within="[1, inf)",
        needs="likelihood chain",
    )
    num_orders: int = flag(8, "random orders of iwae", metavar="K", within="[2, inf)", needs="likelihood iwae")

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("likelihood", (None, *LIKELIHOODS)), ("chain_order", ORDERS)):
            value = getattr(self, name)
            require(value in choices, name, value, f"is not one of {', '.join(filter(None, choices))}")
