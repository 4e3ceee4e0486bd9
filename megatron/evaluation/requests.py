"""What is asked of a scorer, how it goes about it, and what it finds."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.flags import flag, require
from megatron.errors import ConfigurationError

ORDERS = ("left-to-right", "right-to-left", "random")
METHODS = ("bound", "chain")
REPLICATES = 4  # of every round of samples: independent, so that their spread is the Monte-Carlo error
LEAST = 1 + REPLICATES


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` behind `context`? Both are token ids; an empty context is the start of a document.

    Requests of one `question` are rivals: the noise of their bounds is the same, and samples are spent until the best
    of them is known. `length`, by default the tokens of the continuation, is what a ranking by length divides by.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    question: str | None = None
    length: float | None = None


@dataclass(frozen=True)
class Score:
    """The answer to a request."""

    log_likelihood: float  # nats; where `upper_bound`, the negative of an upper bound; nan where it was not asked for
    is_greedy: bool | None  # whether the model itself would go on so; None where it was not asked for
    standard_error: float = 0.0  # Monte-Carlo error of log_likelihood, nats
    samples: int = 0  # rows that the likelihood took
    forward_tokens: int = 0  # read for all of it
    upper_bound: bool = False
    truncated_tokens: int = 0  # at the beginning of the context, which did not fit


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How requests are scored. All but the last four act in masked diffusion only."""

    method: str = flag(
        "bound",
        "masked diffusion: bound, the mean over all orders of the tokens, or chain, exactly in one order",
        choices=METHODS,
    )
    num_mc: int = flag(32, "masked diffusion: most samples (rows) of a request's bound")
    eval_seed: int = flag(0, "masked diffusion: seed of the samples")
    decide_at: float = flag(
        3.0,
        "masked diffusion: answers of a question get no more samples once the best one leads each other by this many "
        "standard errors; 0: all get --num-mc",
        metavar="Z",
    )
    chain_order: str = flag("left-to-right", "masked diffusion: the order of --method chain", choices=ORDERS)
    cfg: float = flag(
        0.0, "masked diffusion: guidance w, logits (1 + w) * conditional - w * unconditional (2410.18514)", metavar="W"
    )
    only_mc_nll: bool = flag(False, "do not find out whether an answer is the model's own; it counts as not its own")
    only_generate: bool = flag(
        False, "masked diffusion: find out only whether an answer is the model's own; likelihoods are nan"
    )
    batch_tokens: int = flag(16384, "tokens of one batch")
    batch_rows: int | None = flag(None, "most rows of one batch; default as many as --batch-tokens holds")

    def __post_init__(self):
        require(self.method in METHODS, "method", self.method, f"is not one of {', '.join(METHODS)}")
        require(self.chain_order in ORDERS, "chain_order", self.chain_order, f"is not one of {', '.join(ORDERS)}")
        rule = f"must be at least {LEAST}: a row that hides all, and {REPLICATES} replicates that give the error"
        require(self.num_mc >= LEAST, "num_mc", self.num_mc, rule)
        require(0 <= self.eval_seed < 2**64, "eval_seed", self.eval_seed, "lies in [0, 2**64)")
        require(self.decide_at >= 0, "decide_at", self.decide_at, "must not be negative; 0 gives all --num-mc samples")
        require(self.cfg >= 0, "cfg", self.cfg, "must not be negative; 0 is no guidance")
        require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "must be at least 1")
        rows = self.batch_rows
        require(rows is None or rows >= 1, "batch_rows", rows, "must be at least 1")
        if self.only_mc_nll and self.only_generate:
            raise ConfigurationError("--only_mc_nll and --only_generate: together leave nothing to find out; drop one")

    def check(self, objective_name: str) -> None:
        """Raise ConfigurationError for settings that mean nothing to a model of this objective, or to one another."""
        usual = Scoring()
        masked_only = ("method", "num_mc", "eval_seed", "decide_at", "chain_order", "cfg", "only_generate")
        for name in masked_only if objective_name != "mdm" else ():
            value = getattr(self, name)
            rule = f"acts in masked diffusion, and this run was trained with --objective {objective_name}; leave it out"
            require(value == getattr(usual, name), name, value, rule)
        idle = {"chain": ("num_mc", "eval_seed", "decide_at"), "bound": ("chain_order",)}[self.method]
        for name in idle:
            drawn = name == "eval_seed" and self.chain_order == "random"
            value = getattr(self, name)
            rule = f"has no effect beside --method {self.method}; leave it out"
            require(drawn or value == getattr(usual, name), name, value, rule)
