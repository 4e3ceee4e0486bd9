"""`--skip-train --likelihood chain` and `iwae`: a run's likelihood under an unmasking policy, in place of its bound.

Every rank holds the whole model, and the data-parallel ranks share the windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron.config.flags import require, typed
from megatron.config.sections import ValidationConfig
from megatron.errors import ConfigurationError
from megatron.generation.sampling import Sampling
from megatron.likelihoods.chains import Chains, chains_of, check_policy, with_steps
from megatron.likelihoods.mixture import MixtureEngine
from megatron.likelihoods.windows import PolicyEngine, WholeWindows
from megatron.model.transformer import Transformer
from megatron.objectives.base import Likelihood
from megatron.objectives.documents import ByDocument
from megatron.parallel.mesh import ParallelContext
from megatron.training.load_run import Trained
from megatron.training.trainer import Trainer
from megatron.validation.evaluate import Evaluation, ValidationSet, evaluate


@dataclass(frozen=True)
class PolicyLikelihood(WholeWindows):
    """Windows of a likelihood as `WholeWindows`, under the name of the policy."""

    kind: str = "chain"  # of `LikelihoodFlags.likelihood`

    @property
    def name(self) -> str:
        """The name of the inner likelihood and the kind, as in records: "mdm chain"."""
        return f"{self.inner.name} {self.kind}"

    @property
    def exact(self) -> bool:
        """Whether the value is exact for the policy, and no bound."""
        return self.kind == "chain"


def evaluate_run(trainer: Trainer) -> list[dict]:
    """Evaluate model and averaged weights on every validation set; return the records. A collective call.

    With --likelihood chain or iwae each likelihood that has a choice of orders is evaluated so, under the name
    SET.chain or SET.iwae; otherwise with every likelihood of the objective.

    Raises: ConfigurationError for policies that the run does not have or that do not fit its windows.
    """
    if trainer.config.validation.likelihood in (None, "bound"):
        return trainer.evaluate()
    records = list(_records(trainer, average=False))
    if trainer.average and trainer.average.steps:
        records += _records(trainer, average=True)
    return records


def _records(trainer: Trainer, *, average: bool) -> Iterator[dict]:
    parts, validation = trainer.parts, trainer.config.validation
    kind = validation.likelihood or ""
    model = _whole_model(trainer, average)
    has_orders = False
    for data in parts.validation_sets:
        for name, likelihood in parts.objective.evaluations(data.name):
            chains = _chains(likelihood, model, kind)
            if chains is None:
                continue
            has_orders = True
            policy = PolicyLikelihood(likelihood, kind=kind)
            tokens = policy.scored_tokens(trainer.config.data.seq_length, validation.eval_alignment)
            check_policy(chains, tokens.stop - tokens.start, validation.tokens_per_step, validation.block_length)
            evaluation, details = _evaluate(trainer, policy, chains, data)
            record_name = f"{name}.{kind}" + (".average" if average else "")
            summary = evaluation.summary() | details
            yield trainer.recorder.record_validation(record_name, policy, evaluation, summary)
    message = "acts on models that have a choice of orders, and this one predicts the next token; leave it out"
    require(has_orders, "likelihood", kind, message)


def _whole_model(trainer: Trainer, average: bool) -> Transformer:
    """Return the whole model on this rank's device, in fp32."""
    parts, origin = trainer.parts, trainer.parts.origin
    assert origin is not None
    trained = Trained(
        name=str(origin.run),
        config=parts.config,
        recorded=parts.description,
        checkpoint=origin.checkpoint,
        meta=origin.meta,
    )
    return trained.model(average, torch.float32, str(parts.ranks.device))


def _chains(likelihood: Likelihood, model: Transformer, kind: str) -> Chains | None:
    """Return the chains of a model with a likelihood; None where it has no choice of orders.

    Raises: ConfigurationError with document rules.
    """
    if isinstance(likelihood, ByDocument) and chains_of(likelihood.inner, model):
        raise ConfigurationError(
            f"{typed('likelihood', kind)}: unmasking one token after another has no document rules; take a run without "
            "--reset-attention-mask, --reset-position-ids and --eod-mask-loss"
        )
    return chains_of(likelihood, model)


def _evaluate(
    trainer: Trainer, policy: PolicyLikelihood, chains: Chains, data: ValidationSet
) -> tuple[Evaluation, dict]:
    """Return the evaluation of a set, and the settings and errors that its record has besides a summary."""
    config, validation, ranks = trainer.config, trainer.config.validation, trainer.ranks
    tokens = policy.scored_tokens(config.data.seq_length, validation.eval_alignment)
    is_chain = policy.kind == "chain"
    engine = _engine(validation, chains, ranks, tokens.stop - tokens.start)
    evaluations = evaluate(
        engine,
        policy,
        data,
        seed=validation.eval_seed,
        replicates=1,
        batch_size=validation.eval_batch_size or config.training.micro_batch_size,
        alignment=validation.eval_alignment,
        models=1 if is_chain else len(MixtureEngine.estimates) + MixtureEngine.num_variances,
    )
    if is_chain:
        names = ("chain_order", "tokens_per_step", "block_length")
        return evaluations[0], {"num_mc": 1} | {name: getattr(validation, name) for name in names}
    index = MixtureEngine.estimates.index("K orders")
    half, whole = evaluations[index - 1], evaluations[index]
    variance = evaluations[len(MixtureEngine.estimates) + index].nats.sum()
    error = None if np.isnan(variance) else float(np.sqrt(variance) / whole.tokens.sum())
    details = {"num_mc": 1, "mc_se": error, "num_orders": validation.num_orders}
    return whole, details | {"loss_of_half_the_orders": half.summary()["loss"]}


def _engine(validation: ValidationConfig, chains: Chains, ranks: ParallelContext, num_masked: int) -> PolicyEngine:
    if validation.likelihood == "iwae":
        sampling = Sampling(order="random", seed=validation.eval_seed)
        return MixtureEngine(chains, ranks, sampling, orders=validation.num_orders)
    sampling = Sampling(order=validation.chain_order, block_length=validation.block_length, seed=validation.eval_seed)
    return PolicyEngine(chains, ranks, with_steps(sampling, validation.tokens_per_step, chains.num_ordered(num_masked)))
