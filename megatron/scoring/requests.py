"""Likelihood requests, the settings of scoring, and scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.capabilities import ScoringForm
from megatron.config.flags import flag, require
from megatron.config.policies import CERTAINTIES, LikelihoodFlags
from megatron.config.sections import ObjectiveConfig
from megatron.errors import ConfigurationError
from megatron.generation.generate import check_direction
from megatron.objectives.registry import capabilities

REPLICATES = 4  # independent replicates of each sampling round; their spread is the Monte-Carlo error
MIN_SAMPLES = 1 + REPLICATES  # the full mask and one per replicate
ESTIMATORS = ("num_mc", "eval_seed", "decide_at")  # fields that act on the bound, and partly on other likelihoods


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
class Scoring(LikelihoodFlags):
    """How requests are scored. All but the last four act only in models that predict masked tokens or in any order."""

    num_mc: int = flag(32, "maximum Monte-Carlo samples (sequences) of a request's bound")
    eval_seed: int = flag(0, "seed of the Monte-Carlo samples and of random orders")
    decide_at: float = flag(
        3.0,
        "bound: stop sampling the choices of a document once the best one leads every other by this many standard "
        "errors; 0: all choices get --num-mc samples",
        metavar="Z",
    )
    cfg: float = flag(
        0.0, "masked diffusion: guidance w, logits (1 + w) * conditional - w * unconditional (2410.18514)", metavar="W"
    )
    only_generate: bool = flag(
        False, "masked diffusion: evaluate only whether a continuation is greedy; likelihoods are nan"
    )
    only_mc_nll: bool = flag(False, "do not evaluate whether a continuation is greedy; it counts as not greedy")
    batch_tokens: int = flag(16384, "tokens of one batch")
    batch_rows: int | None = flag(None, "maximum sequences of one batch; default: as many as --batch-tokens holds")

    def __post_init__(self):
        super().__post_init__()
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

    def form(self, objective_name: str) -> ScoringForm:
        """Return how a model of an objective is scored: its default, or the form that has `likelihood`."""
        forms = capabilities(objective_name).scoring
        return forms[0] if self.likelihood is None else forms[-1]

    def check(self, objective: ObjectiveConfig, seq_length: int) -> None:
        """Check that every setting acts for a model of this objective and together with the others.

        Raises: ConfigurationError for a setting without effect, for steps of more tokens than there are, and for a
        model that reads from right to left only.
        """
        check_direction(objective)
        form = self.form(objective.objective)
        if form == "causal":
            reason = (
                f"acts in masked diffusion, and this run was trained with --objective {objective.objective}; leave it "
                "out"
            )
            if capabilities(objective.objective).scoring[-1] != "causal":
                reason = "has no effect on the likelihood from left to right; leave it out, or give --likelihood"
            for name in ("likelihood", *ESTIMATORS, "cfg", "only_generate"):
                self._refuse(name, reason)
            return
        likelihood = self.likelihood or "bound"
        draws = likelihood == "iwae" or self.chain_order == "random"
        acting = {"bound": ESTIMATORS, "chain": (), "iwae": ()}[likelihood] + (("eval_seed",) if draws else ())
        for name in ESTIMATORS:
            if name not in acting:
                self._refuse(name, f"has no effect with --likelihood {likelihood}; leave it out")
        size, unit = seq_length - 1, "of the longest continuation"
        if form == "blocks":
            size, unit = min(objective.diffusion_block_size, size), "of a block (--diffusion-block-size)"
            self._refuse("cfg", "masks the context, which block diffusion reads unmasked; leave it out")
            self._refuse("block_length", "has no effect on a model that has blocks of its own; leave it out")
        elif form == "permuted":
            self._check_permuted()
        message = f"is more than the {size} tokens {unit}; give fewer"
        require(self.tokens_per_step <= size, "tokens_per_step", self.tokens_per_step, message)

    def _check_permuted(self) -> None:
        """Check that settings act for a model that reads tokens in a given order."""
        for name in ("cfg", "only_generate", "decide_at"):
            self._refuse(
                name, "acts in masked diffusion, and this model predicts tokens in a given order; leave it out"
            )
        self._refuse("tokens_per_step", "is not supported, this model predicts one token after another; leave it out")
        message = (
            "needs a prediction for every remaining token at each step, and this model predicts one at a time; give "
            "left-to-right, right-to-left or random"
        )
        require(self.chain_order not in CERTAINTIES, "chain_order", self.chain_order, message)

    def _refuse(self, name: str, reason: str) -> None:
        value = getattr(self, name)
        require(value == getattr(type(self), name), name, value, reason)
