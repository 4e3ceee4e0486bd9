"""Ensembles: the mean of the conditional probabilities of several training runs.

For every scored token p = mean over k of p_k, so nll = log K - logsumexp over k of -nll_k. The mean of conditionals is
a model of the same kind: for AR its loss is exact, and for masked diffusion it is a denoiser whose bound is evaluated
as any other's, with the same masks for all members. (The ensembles of 2509.14786 average logits, which gives different
losses.)
"""

import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.config.flags import require, typed
from megatron.config.resolve import no_op_flags
from megatron.config.sections import SECTIONS, Config
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.base import Likelihood
from megatron.objectives.registry import build_objective, document_rules
from megatron.parallel.apply import build_engine
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext
from megatron.reporting.member_selection import Selection, select_greedily
from megatron.statistics import clustered_ratio
from megatron.training.checkpoint_store import CheckpointStore, load_checkpoint
from megatron.training.datasets import Sources, check_tokenizer, open_sources
from megatron.training.load_run import Trained, open_trained, shared_settings, trained_config
from megatron.validation.evaluate import Evaluation, ValidationSet, evaluate

logger = logging.getLogger(__name__)

COLUMNS = ("loss", "data_se", "mc_se", "bits_per_byte")


class Members:
    """Several engines as one for `evaluate`: the NLL of each."""

    def __init__(self, engines: list[Engine]):
        self.engines, self.ranks = engines, engines[0].ranks

    def nll(self, batch: Batch) -> Tensor:
        """Return the unweighted NLL per position of each of K members, fp32 [K, B, S]."""
        return torch.stack([engine.nll(batch) for engine in self.engines])

    def train(self) -> None:
        """Put all members into training mode."""
        for engine in self.engines:
            engine.train()

    def eval(self) -> None:
        """Put all members into evaluation mode."""
        for engine in self.engines:
            engine.eval()

    def reshard(self) -> None:
        """Free the gathered weights of all members."""
        for engine in self.engines:
            engine.reshard()


class Ensemble(Members):
    """Members, and the ensembles of the first 1, 2, ... of them."""

    def nll(self, batch: Batch) -> Tensor:
        """Return the unweighted NLL per position, fp32 [2K, B, S]: of K members, then of the first 1 to K together."""
        members = super().nll(batch)
        sizes = torch.arange(1, len(members) + 1, device=members.device)
        return torch.cat([members, sizes.log()[:, None, None] - torch.logcumsumexp(-members, dim=0)])


class Candidates(Members):
    """Members whose NLL of each scored token of this rank is stored."""

    def __init__(self, engines: list[Engine]):
        super().__init__(engines)
        self.losses: list[np.ndarray] = []  # of each batch, fp32 [K, R], R scored positions
        self.weights: list[np.ndarray] = []  # of each batch, fp32 [R]

    def nll(self, batch: Batch) -> Tensor:
        """Return what `Members.nll` returns."""
        members, scored = super().nll(batch), batch.scored_positions
        self.losses.append(members.flatten(1).cpu()[:, scored].numpy())
        self.weights.append(batch.weights.flatten()[scored].numpy())
        return members


def shared(member: Trained) -> dict:
    """Return the settings that all members of an ensemble must share."""
    settings = shared_settings(member.config, member.recorded["vocabulary_size"])
    return settings | {"--eval-alignment": member.config.validation.eval_alignment}


def settings(run: str, flags: list[str]) -> Config:
    """Return the configuration for evaluating a run, or a checkpoint of one: as --skip-train with `flags`.

    Raises: ConfigurationError where there is no run, or a flag is neither of data nor of validation.
    """
    config = trained_config(run, flags)
    likelihood = config.validation.likelihood
    require(likelihood is None, "likelihood", likelihood, "acts in --skip-train of pretrain_*.py only; leave it out")
    recorded_config = trained_config(run, ())
    for section_name in [name for name in SECTIONS if name not in ("data", "validation")]:
        section, recorded = getattr(config, section_name), getattr(recorded_config, section_name)
        for name in (field.name for field in fields(section)):
            value = getattr(section, name)
            if value != getattr(recorded, name):
                raise ConfigurationError(
                    f"{typed(name, value)}: is neither a flag of data nor of validation, and everything else is as the "
                    "run was trained; leave it out"
                )
    return config


def expand_snapshots(runs: list[str]) -> list[str]:
    """Return `runs` with each RUN@snapshots replaced by the checkpoints that RUN keeps for good, the newest first.

    They are the last of every cycle of --lr-decay-style cyclic, and those of --keep-iterations and --keep-every-epochs.

    Raises: ConfigurationError for a run without such a checkpoint.
    """
    names = []
    for name in runs:
        run, at, suffix = name.rpartition("@")
        if not at or suffix != "snapshots":
            names.append(name)
            continue
        snapshots = [str(folder) for folder in reversed(CheckpointStore.of_run(Path(run)).permanent())]
        if not snapshots:
            raise ConfigurationError(
                f"{name}: keeps no snapshot; train with --lr-decay-style cyclic, --keep-every-epochs or "
                "--keep-iterations"
            )
        names += snapshots
    return names


def open_members(runs: list[str], which: str, flags: list[str]) -> list[Trained]:
    """Return the members: the `which` ("latest" or "best") checkpoint of each run, or a checkpoint that `runs` names.

    `flags` are as in `settings`. Models may differ.

    Raises: ConfigurationError for fewer than two members, one checkpoint twice, and members that differ in `shared`.
    """
    members = []
    for name in runs:
        settings(name, flags)
        member = open_trained(name, which, flags)
        for other in members:
            if member.checkpoint.resolve() == other.checkpoint.resolve():
                raise ConfigurationError(f"{name}: is the same checkpoint as {other.name}; name each member once")
        for setting, value in shared(member).items() if members else ():
            expected = shared(members[0])[setting]
            if value != expected:
                raise ConfigurationError(
                    f"{name}: has {setting} {value}, and {runs[0]} has {expected}; members must share it, leave one out"
                )
        members.append(member)
    if len(members) < 2:
        raise ConfigurationError(f"{runs[0]}: is one member, and an ensemble needs two or more; name another run")
    return members


def check_data(members: list[Trained], sources: Sources) -> None:
    """Check that the validation data has the members' vocabulary and is the text that they were validated on.

    Raises: ConfigurationError otherwise, and where there is no validation set.
    """
    if not sources.validation:
        raise ConfigurationError(f"{members[0].name}: has no validation set; give --valid-data-path")
    for member in members:
        check_tokenizer(member.recorded, sources.tokenizer, member.name)
        for data in sources.validation:
            expected = sources.fingerprints[data.name]
            if member.recorded["fingerprints"].get(data.name, expected) != expected:
                raise ConfigurationError(
                    f"{member.name}: was validated on other tokens named {data.name}; leave it out, or give this text "
                    "another name: --valid-data-path NAME=PREFIX"
                )


def evaluate_members(members: list[Trained], ranks: ParallelContext, selection: Selection | None = None) -> dict:
    """Return the record of an evaluation on every validation set of the first member, the same on every rank.

    For each set it has `Evaluation.summary` of every member, and of the ensembles of the first 1 to K of them. Data,
    noise and alignment are the first member's; each member has its own precision. With a `selection` the members are
    the selected ones, in their order, and the sets are those that did not select them.
    """
    first = members[0]
    validation = first.config.validation
    sources = open_sources(first.config)
    check_data(members, sources)
    vocabulary = first.vocabulary
    documents = document_rules(first.config.data, first.config.objective, sources.tokenizer.eod)
    objective = build_objective(first.config.objective, vocabulary, first.meta["time_block"], documents)
    exact = all(likelihood.exact for likelihood in objective.likelihoods)
    for line in no_op_flags(first.config, exact) if ranks.rank == 0 else ():
        logger.info(line)
    engines = [_engine(member, vocabulary, ranks) for member in members]
    validation_sets, selection_record = sources.validation, {}
    if selection:
        selecting_set, validation_sets = selection.split(sources, len(members))
        likelihood = objective.likelihoods[0]
        selected, losses = _select(members, engines, selecting_set, likelihood=likelihood, size=selection.size)
        members, engines = [members[index] for index in selected], [engines[index] for index in selected]
        selection_record = {"selection": {"set": selecting_set.name, "losses": losses}}
    ensemble = Ensemble(engines)
    sets = {
        name: _evaluate_set(members, ensemble, name, data=data, likelihood=likelihood)
        for data in validation_sets
        for name, likelihood in objective.evaluations(data.name)
    }
    return {
        "objective_name": objective.name,
        "average": "probabilities",
        "alignment": validation.eval_alignment,
        "eval_seed": validation.eval_seed,
        "members": [
            {
                "name": member.name,
                "checkpoint": str(member.checkpoint),
                "iteration": member.meta["iteration"],
                "consumed_samples": member.meta["consumed_samples"],
                "parameters": member.recorded["parameters"],
            }
            for member in members
        ],
        **selection_record,
        "sets": sets,
    }


def _select(
    members: list[Trained], engines: list[Engine], data: ValidationSet, *, likelihood: Likelihood, size: int
) -> tuple[list[int], list[float]]:
    """Return which members are selected on `data`, in order, and the losses of the first 1, 2, ... of them there.

    Raises: ConfigurationError where the loss of a member is not finite.
    """
    candidates = Candidates(engines)
    evaluations = evaluate(candidates, likelihood, data, **_evaluation_settings(members[0].config), models=len(members))
    _check_finite(members, evaluations, data.name)
    nll, weights = np.concatenate(candidates.losses, axis=1), np.concatenate(candidates.weights)
    selected, nats = select_greedily(nll, weights, size, candidates.ranks)
    return selected, [value / (evaluations[0].tokens.sum() * len(evaluations[0].nats)) for value in nats]


def _evaluate_set(
    members: list[Trained], ensemble: Ensemble, name: str, *, data: ValidationSet, likelihood: Likelihood
) -> dict:
    """Return the summaries of every member, and of the ensembles of the first 1 to K of them, on one set.

    Raises: ConfigurationError where the loss of a member is not finite.
    """
    first = members[0].config
    validation = first.validation
    results = evaluate(ensemble, likelihood, data, **_evaluation_settings(first), models=2 * len(members))
    singles, ensembles = results[: len(members)], results[len(members) :]
    _check_finite(members, singles, name)
    return {
        "upper_bound": not likelihood.exact,
        "num_mc": 1 if likelihood.exact else validation.num_mc,
        "members": [evaluation.summary() for evaluation in singles],
        "ensembles": [
            {"size": size, **evaluation.summary(), **_gain(singles[:size], evaluation)}
            for size, evaluation in enumerate(ensembles, start=1)
        ],
    }


def _evaluation_settings(config: Config) -> dict:
    """Return the arguments of `evaluate` that flags decide."""
    validation = config.validation
    return {
        "seed": validation.eval_seed,
        "replicates": validation.num_mc,
        "batch_size": validation.eval_batch_size or config.training.micro_batch_size,
        "alignment": validation.eval_alignment,
    }


def _check_finite(members: list[Trained], evaluations: list[Evaluation], name: str) -> None:
    """Check the losses of members on a set.

    Raises: ConfigurationError for one that is not finite.
    """
    for member, evaluation in zip(members, evaluations, strict=True):
        if not np.isfinite(evaluation.nats).all():
            raise ConfigurationError(f"{member.name}: its loss on {name} is not finite; leave it out")


def _engine(member: Trained, vocabulary: Vocabulary, ranks: ParallelContext) -> Engine:
    """Return the engine of a member with the weights of its checkpoint, without an optimizer."""
    config = member.config
    bf16 = member.recorded["precision"] == "bf16"
    seed = config.training.seed
    engine = build_engine(config.model, vocabulary, ranks, config.parallel, seed=seed, bf16=bf16, compile=False)
    weights = {f"model.{name}": parameter.detach() for name, parameter in engine.named_parameters()}
    load_checkpoint(member.checkpoint, weights)
    return engine


def _gain(members: list[Evaluation], ensemble: Evaluation) -> dict:
    """Return the mean of the members' losses minus the ensemble's, in nats per token, and its data_se.

    Differences are paired by document, so that the difficulty of documents does not enter the error.
    """
    nats = np.mean([member.nats for member in members], axis=0) - ensemble.nats
    gain = clustered_ratio(nats, ensemble.tokens)  # nats [R, D]
    return {"gain": gain.value, "gain_se": gain.standard_error}


def table(record: dict) -> str:
    """Return the record as text: one table per set, and a legend of the columns."""
    lines = []
    members = record["members"]
    if "selection" in record:
        selection = record["selection"]
        losses = ", ".join(f"{loss:.4f}" for loss in selection["losses"])
        lines += [f"selected on {selection['set']}, in this order; losses there, too low: {losses}", ""]
    for name, results in record["sets"].items():
        rows = [[f"{name} ({record['alignment']})", "nats per token", "bits/byte", "gain"]]
        for member, summary in zip(members, results["members"], strict=True):
            rows.append([f"{member['name']} step {member['iteration']}", *_cells(results, summary), ""])
        for summary in results["ensembles"][1:]:
            gain = f"{summary['gain']:.4f}" + (f" ± {summary['gain_se']:.4f}" if summary["gain_se"] else "")
            rows.append([f"the first {summary['size']} together", *_cells(results, summary), gain])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows] + [""]
    lines.append("Ensembles average probabilities, token by token. ±: standard error over documents; gain: mean of the")
    lines.append("members' losses minus the loss of the ensemble, paired by document.")
    bounds = [results["num_mc"] for results in record["sets"].values() if results["upper_bound"]]
    if bounds:
        lines.append(
            f"≤: upper bounds of the negative log-likelihood, from {bounds[0]} noise replicates, the same for "
            "all; mc: their standard error."
        )
    return "\n".join(lines)


def _cells(results: dict, summary: dict) -> list[str]:
    loss, data_se, mc_se, bits = (summary[name] for name in COLUMNS)
    bound = "≤ " if results["upper_bound"] else ""
    errors = (f" ± {data_se:.4f}" if data_se else "") + (f" (mc {mc_se:.4f})" if mc_se else "")
    return [f"{bound}{loss:.4f}{errors}", f"{bound}{bits:.4f}" if bits else "-"]
