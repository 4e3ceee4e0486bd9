"""Likelihood requests, the settings of scoring, and scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.flags import flag, require
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities

ORDERS = ("left-to-right", "right-to-left", "random")
METHODS = ("bound", "chain")
REPLICATES = 4  # independent replicates of each sampling round; their spread is the Monte-Carlo error
MIN_SAMPLES = 1 + REPLICATES  # the full mask and one per replicate


@dataclass(frozen=True)
class Request:
    """The log-likelihood of `continuation` after `context`, in token ids; an empty context is the start of a document.

    Requests with the same `doc_key` are the choices of one document: their bounds share the Monte-Carlo noise, and
    sampling stops once the best choice is known. `length`, by default the number of tokens of the continuation, is the
    divisor of length-normalised scores.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    doc_key: str | None = None
    length: float | None = None


@dataclass(frozen=True)
class Score:
    """The result of a request."""

    log_likelihood: float  # nats; where `upper_bound`, the negative of an upper bound; nan where not requested
    is_greedy: bool | None  # whether greedy decoding gives the continuation; None where not requested
    standard_error: float = 0.0  # Monte-Carlo error of log_likelihood, nats
    samples: int = 0  # sequences that were evaluated for the likelihood
    forward_tokens: int = 0  # tokens of all forward passes of the request
    upper_bound: bool = False
    truncated_tokens: int = 0  # tokens cut from the beginning of the context


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How requests are scored. All but the last four act in masked diffusion only."""

    method: str = flag(
        "bound",
        "masked diffusion: bound, the mean over all orders of the tokens, or chain, the exact chain rule in one order",
        choices=METHODS,
    )
    num_mc: int = flag(32, "masked diffusion: maximum Monte-Carlo samples (sequences) of a request's bound")
    eval_seed: int = flag(0, "masked diffusion: seed of the Monte-Carlo samples")
    decide_at: float = flag(
        3.0,
        "masked diffusion: stop sampling the choices of a document once the best one leads every other by this many "
        "standard errors; 0: all choices get --num-mc samples",
        metavar="Z",
    )
    chain_order: str = flag("left-to-right", "masked diffusion: the order of --method chain", choices=ORDERS)
    cfg: float = flag(
        0.0, "masked diffusion: guidance w, logits (1 + w) * conditional - w * unconditional (2410.18514)", metavar="W"
    )
    only_mc_nll: bool = flag(False, "do not evaluate whether a continuation is greedy; it counts as not greedy")
    only_generate: bool = flag(
        False, "masked diffusion: evaluate only whether a continuation is greedy; likelihoods are nan"
    )
    batch_tokens: int = flag(16384, "tokens of one batch")
    batch_rows: int | None = flag(None, "maximum sequences of one batch; default: as many as --batch-tokens holds")

    def __post_init__(self):
        require(self.method in METHODS, "method", self.method, f"is not one of {', '.join(METHODS)}")
        require(self.chain_order in ORDERS, "chain_order", self.chain_order, f"is not one of {', '.join(ORDERS)}")
        minimum = (
            f"must be at least {MIN_SAMPLES}: the fully masked sequence, and {REPLICATES} replicates for the error"
        )
        require(self.num_mc >= MIN_SAMPLES, "num_mc", self.num_mc, minimum)
        require(0 <= self.eval_seed < 2**64, "eval_seed", self.eval_seed, "lies in [0, 2**64)")
        require(self.decide_at >= 0, "decide_at", self.decide_at, "must not be negative; 0 takes all --num-mc samples")
        require(self.cfg >= 0, "cfg", self.cfg, "must not be negative; 0 is no guidance")
        require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "must be at least 1")
        sequences = self.batch_rows
        require(sequences is None or sequences >= 1, "batch_rows", sequences, "must be at least 1")
        if self.only_mc_nll and self.only_generate:
            raise ConfigurationError("--only_mc_nll and --only_generate: together leave nothing to evaluate; drop one")

    def check(self, objective_name: str) -> None:
        """Check that every setting acts for a model of this objective and together with the others.

        Raises: ConfigurationError for a setting without effect.
        """
        defaults = Scoring()
        masked_only = ("method", "num_mc", "eval_seed", "decide_at", "chain_order", "cfg", "only_generate")
        for name in () if capabilities(objective_name).scoring == "masked" else masked_only:
            value = getattr(self, name)
            reason = (
                f"acts in masked diffusion, and this run was trained with --objective {objective_name}; leave it out"
            )
            require(value == getattr(defaults, name), name, value, reason)
        no_ops = {"chain": ("num_mc", "eval_seed", "decide_at"), "bound": ("chain_order",)}[self.method]
        for name in no_ops:
            acts = name == "eval_seed" and self.chain_order == "random"
            value = getattr(self, name)
            reason = f"has no effect with --method {self.method}; leave it out"
            require(acts or value == getattr(defaults, name), name, value, reason)
