"""All likelihoods of one run on the same windows: the bound, unmasking policies, the mixture over orders, AR's loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron.data.blend import ValidationBlend
from megatron.errors import ConfigurationError
from megatron.generation.sampling import Sampling
from megatron.likelihoods.chains import Chains, chains_of, check_policy, with_steps
from megatron.likelihoods.mixture import MixtureEngine
from megatron.likelihoods.windows import PolicyEngine, WholeWindows
from megatron.model.transformer import Transformer
from megatron.objectives.base import Likelihood
from megatron.objectives.documents import ByDocument
from megatron.objectives.registry import build_objective, document_rules
from megatron.parallel.mesh import ParallelContext
from megatron.reporting.resumable import ResumableEngine
from megatron.scoring.answer_cache import AnswerCache
from megatron.statistics import paired_difference
from megatron.training.datasets import check_tokenizer, open_sources
from megatron.training.load_run import Trained
from megatron.validation.evaluate import Evaluation, EvaluationEngine, ValidationSet, evaluate

DEFAULT_ORDERS = ("left-to-right", "right-to-left", "confidence", "margin", "entropy")
DEFAULT_NUM_ORDERS = 8


@dataclass(frozen=True, kw_only=True)
class Policies:
    """Which likelihoods to compute besides the bound of a model that has a choice of orders; None: the default."""

    orders: tuple[str, ...] | None  # of Sampling
    tokens_per_step: int
    block_length: int | None
    num_orders: int | None  # random orders of the mixture, even; 0 leaves it out


@dataclass(frozen=True)
class ModelEngine:
    """A whole model on this rank as an `EvaluationEngine`."""

    model: Transformer
    ranks: ParallelContext

    def nll(self, batch):
        """Return the unweighted NLL per position, fp32 [B, S]."""
        return self.model(batch.to(self.ranks.device), per_position=True)

    def train(self) -> None:
        """Do nothing: the model is not trained."""

    def eval(self) -> None:
        """Set evaluation mode."""
        self.model.eval()

    def reshard(self) -> None:
        """Do nothing: the model is whole on every rank."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One evaluation: its names, one for each result, and how to run it."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]  # exact, upper or lower: how the result bounds the NLL that it is named after
    likelihood: Likelihood
    engine: EvaluationEngine
    replicates: int = 1
    passes: int  # forward passes of a window
    policy: Sampling | None = None  # None: the loss of validation
    num_variances: int = 0  # of the first results, over random orders, which the engine returns after the results


def evaluate_likelihoods(
    trained: Trained,
    policies: Policies,
    ranks: ParallelContext,
    *,
    windows: int,
    average: bool = False,
    progress: str | None = None,
) -> dict:
    """Return the record of every likelihood of a run on its validation sets, the same on every rank.

    Each rank holds the whole model; the windows, `windows` of each set spread evenly over it, are divided among ranks.
    The NLL of every batch is stored under the path `progress` (`AnswerCache`), and read from there if it was computed
    before.

    Raises: ConfigurationError for policies that the run does not have or that do not fit its windows.
    """
    sources = open_sources(trained.config)
    check_tokenizer(trained.recorded, sources.tokenizer, trained.name)
    if not sources.validation:
        raise ConfigurationError(f"{trained.name}: has no validation set; give --valid-data-path")
    rules = document_rules(trained.config.data, trained.config.objective, sources.tokenizer.eod)
    objective = build_objective(trained.config.objective, trained.vocabulary, trained.meta["time_block"], rules)
    model = trained.model(average, device=str(ranks.device))
    rows = list(_rows(trained, objective.likelihoods, policies, ModelEngine(model, ranks)))
    sets = [_limited(data, windows) for data in sources.validation]
    cache = AnswerCache(progress, ranks.rank, {"checkpoint": trained.meta, "average": average})
    return {
        "run": trained.name,
        "checkpoint": str(trained.checkpoint),
        "iteration": trained.meta["iteration"],
        "average": average,
        "objective_name": objective.name,
        "alignment": trained.config.validation.eval_alignment,
        "eval_seed": trained.config.validation.eval_seed,
        "sets": {data.name: _evaluate_set(trained, data, rows, cache) for data in sets},
    }


def _rows(
    trained: Trained, likelihoods: Sequence[Likelihood], policies: Policies, engine: ModelEngine
) -> Iterator[_Row]:
    """Yield the evaluations of a run: each likelihood of its objective, then the policies of those with orders."""
    num_mc = trained.config.validation.num_mc
    has_orders = False
    for likelihood in likelihoods:
        kind, name = (
            ("exact", f"{likelihood.name}, exact") if likelihood.exact else ("upper", f"{likelihood.name}, bound")
        )
        replicates = 1 if likelihood.exact else num_mc
        yield _Row(
            names=(name,),
            kinds=(kind,),
            likelihood=likelihood,
            engine=engine,
            replicates=replicates,
            passes=replicates,
        )
        if chains := chains_of(likelihood, engine.model):
            has_orders = True
            yield from _policy_rows(trained, WholeWindows(likelihood), chains, policies=policies, ranks=engine.ranks)
        elif isinstance(likelihood, ByDocument) and chains_of(likelihood.inner, engine.model):
            raise ConfigurationError(
                f"{trained.name}: was trained with document rules, which unmasking one token after another does not "
                "have; take a run without --reset-attention-mask, --reset-position-ids and --eod-mask-loss"
            )
    if not has_orders and (policies.orders or policies.num_orders or policies.block_length):
        raise ConfigurationError(
            f"{trained.name}: predicts the next token, from left to right, and has no choice of orders; leave out "
            "--orders, --num-orders and --block-length"
        )


def _policy_rows(
    trained: Trained, whole: WholeWindows, chains: Chains, *, policies: Policies, ranks: ParallelContext
) -> Iterator[_Row]:
    tokens = whole.scored_tokens(trained.config.data.seq_length, trained.config.validation.eval_alignment)
    num_masked = tokens.stop - tokens.start
    block, size = policies.block_length, chains.num_ordered(num_masked)
    seed = trained.config.validation.eval_seed
    check_policy(chains, num_masked, policies.tokens_per_step, block)
    for order in DEFAULT_ORDERS if policies.orders is None else policies.orders:
        sampling = Sampling(order=order, block_length=block, seed=seed)
        sampling = with_steps(sampling, policies.tokens_per_step, size)
        policy = PolicyEngine(chains, ranks, sampling)
        passes = chains.passes(sampling, num_masked)
        yield _Row(
            names=(f"chain, {order}",),
            kinds=("exact",),
            likelihood=whole,
            engine=policy,
            passes=passes,
            policy=sampling,
        )
    count = DEFAULT_NUM_ORDERS if policies.num_orders is None else policies.num_orders
    if count:
        sampling = Sampling(order="random", seed=seed)
        mixture = MixtureEngine(chains, ranks, sampling, orders=count)
        names = (f"mean over {count} orders", f"iwae, {count // 2} orders", f"iwae, {count} orders", "tangent bound")
        yield _Row(
            names=names,
            kinds=("upper", "upper", "upper", "lower"),
            likelihood=whole,
            engine=mixture,
            passes=count * chains.passes(sampling, num_masked),
            policy=sampling,
            num_variances=MixtureEngine.num_variances,
        )


def _limited(data: ValidationSet, windows: int) -> ValidationSet:
    """Return a set with at most so many of its windows, spread evenly over it.

    Raises: ConfigurationError for a blend.
    """
    if isinstance(data.windows, ValidationBlend):
        raise ConfigurationError(f"{data.name}: is a blend, of which no evenly spread windows are taken; name one set")
    return replace(data, windows=data.windows.limited(windows))


def _evaluate_set(trained: Trained, data: ValidationSet, rows: Sequence[_Row], cache: AnswerCache) -> dict:
    """Return the summaries of all evaluations of a set; differences are to the first, paired by document.

    `nats` are the sums of a likelihood by document, of those `documents` that have scored tokens, a slice of each
    window. They and the difference are None where a likelihood scores other tokens than the first.
    """
    validation = trained.config.validation
    results: list[dict] = []
    first: Evaluation | None = None
    for row in rows:
        engine = ResumableEngine(row.engine, cache, f"{row.names} {row.policy}")
        evaluations = evaluate(
            engine,
            row.likelihood,
            data,
            seed=validation.eval_seed,
            replicates=row.replicates,
            batch_size=validation.eval_batch_size or trained.config.training.micro_batch_size,
            alignment=validation.eval_alignment,
            models=len(row.names) + row.num_variances,
        )
        first = first or evaluations[0]
        variances = evaluations[len(row.names) :]
        errors = [*map(_standard_error, variances), *[None] * (len(row.names) - len(variances))]
        for name, kind, evaluation, error in zip(row.names, row.kinds, evaluations, errors):
            summary = evaluation.summary()
            summary["mc_se"] = summary["mc_se"] if error is None else error
            costs = {"passes": row.passes, "seconds": engine.seconds}
            results.append({"name": name, "kind": kind, **costs, **summary, **_comparison(evaluation, first)})
    assert first is not None
    scored = first.tokens.nonzero()[0]
    documents = {"indices": scored.tolist(), "tokens": first.tokens[scored].tolist()}
    tokens = rows[0].likelihood.scored_tokens(trained.config.data.seq_length, validation.eval_alignment)
    return {
        "windows": len(data.windows),
        "scored_tokens": [tokens.start, tokens.stop],
        "documents": documents,
        "likelihoods": results,
    }


def _comparison(evaluation: Evaluation, first: Evaluation) -> dict:
    """Return the difference to the first evaluation, its standard error, and the sums by document."""
    if not np.array_equal(evaluation.tokens, first.tokens):
        return dict.fromkeys(("difference", "difference_se", "nats"))
    difference = paired_difference(evaluation.nats, first.nats, first.tokens)
    nats = evaluation.nats.mean(axis=0)[first.tokens > 0].tolist()
    return {"difference": difference.value, "difference_se": difference.standard_error, "nats": nats}


def _standard_error(variance: Evaluation) -> float | None:
    """Return the standard error of a loss, given the variances of its sums by document; None where they are NaN."""
    error = float(np.sqrt(variance.nats.sum()) / variance.tokens.sum())
    return None if np.isnan(error) else error
