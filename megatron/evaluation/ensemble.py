"""Ensembles: trained runs that answer together, by the mean of their conditional probabilities.

For every scored token p = mean over k of p_k, so nll = log K - logsumexp over k of -nll_k. The mean of conditionals is
one more model of the same kind: for AR its loss is exact, and for masked diffusion it is a denoiser whose bound is
evaluated as any other's, with the same masks for all members. (The ensembles of 2509.14786 average logits, which gives
other numbers.)
"""

import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.config.flags import spelling, typed
from megatron.config.resolve import no_op_flags
from megatron.config.sections import SECTIONS, Config, Vocabulary
from megatron.errors import ConfigurationError
from megatron.figures import pyplot, save_png
from megatron.objectives import DOCUMENT_RULES, build_objective, document_rules
from megatron.parallel.apply import build_engine
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext
from megatron.training import checkpoint
from megatron.training.datasets import Sources, open_sources
from megatron.training.load_run import Trained, open_trained, trained_config
from megatron.validation.evaluate import Evaluation, evaluate

logger = logging.getLogger(__name__)

FIGURES = ("loss", "data_se", "mc_se", "bits_per_byte")


class Ensemble:
    """Several engines as one, to `evaluate`: their nll, and that of the first one, two, ... of them together."""

    def __init__(self, engines: list[Engine]):
        self.engines, self.ranks = engines, engines[0].ranks

    def nll(self, batch: Batch) -> Tensor:
        """Return the unweighted nll per position, fp32 [2K, B, S]: of each of K members, and of the first 1 to K."""
        members = torch.stack([engine.nll(batch) for engine in self.engines])
        sizes = torch.arange(1, len(members) + 1, device=members.device)
        return torch.cat([members, sizes.log()[:, None, None] - torch.logcumsumexp(-members, dim=0)])

    def train(self) -> None:
        for engine in self.engines:
            engine.train()

    def eval(self) -> None:
        for engine in self.engines:
            engine.eval()

    def reshard(self) -> None:
        for engine in self.engines:
            engine.reshard()


def shared(member: Trained) -> dict:
    """Return what all members of an ensemble agree in."""
    config = member.config
    return {
        "objective": member.recorded["objective_name"],
        **{spelling(name): getattr(config.objective, name) for name in ("target_positions", "diffusion_block_size")},
        **{spelling(name): getattr(config.data, name) for name in DOCUMENT_RULES},
        "vocabulary size": member.recorded["vocabulary_size"],
        "--tokenizer-type": config.data.tokenizer_type,
        "--eval-alignment": config.validation.eval_alignment,
    }


def settings(run: str, flags: list[str]) -> Config:
    """Return the configuration that a run, or a checkpoint of one, is evaluated with: as --skip-train beside `flags`.

    Raises ConfigurationError where there is no run, or a flag is none of data or validation.
    """
    config, plain = (trained_config(run, more) for more in (flags, ()))
    for section in [section for section in SECTIONS if section not in ("data", "validation")]:
        asked, given = getattr(config, section), getattr(plain, section)
        for name in (field.name for field in fields(asked)):
            if getattr(asked, name) != getattr(given, name):
                raise ConfigurationError(
                    f"{typed(name, getattr(asked, name))}: is a flag of neither data nor validation, and in all else "
                    "each run is as it was trained; leave it out"
                )
    return config


def open_members(runs: list[str], which: str, flags: list[str]) -> list[Trained]:
    """Return the members: the `which` ("latest" or "best") checkpoint of each run, or the checkpoint that is named.

    `flags` are as in `settings`. Raises ConfigurationError where runs cannot stand together; their models may differ.
    """
    members = []
    for name in runs:
        settings(name, flags)
        member = open_trained(name, which, flags)
        for other in members:
            if member.checkpoint.resolve() == other.checkpoint.resolve():
                raise ConfigurationError(f"{name}: is the same checkpoint as {other.name}; name each member once")
        for what, value in shared(member).items() if members else ():
            expected = shared(members[0])[what]
            if value != expected:
                raise ConfigurationError(
                    f"{name}: has {what} {value}, and {runs[0]} has {expected}; members agree in it, leave one out"
                )
        members.append(member)
    if len(members) < 2:
        raise ConfigurationError(f"{runs[0]}: is one member, and an ensemble has two or more; name another run")
    return members


def check_data(members: list[Trained], sources: Sources) -> None:
    """Refuse data of another vocabulary, and other text than a member was validated on under the same name."""
    size = sources.tokenizer.vocabulary_size
    if not sources.validation:
        raise ConfigurationError(f"{members[0].name}: has no validation set; give --valid-data-path")
    for member in members:
        known = member.recorded["vocabulary_size"]
        if known != size:
            raise ConfigurationError(
                f"{member.name}: knows {known} token ids, and this data has {size}; give data of the same tokenizer"
            )
        for data in sources.validation:
            expected = sources.fingerprints[data.name]
            if member.recorded["fingerprints"].get(data.name, expected) != expected:
                raise ConfigurationError(
                    f"{member.name}: was validated on other tokens under the name {data.name} than are evaluated; "
                    "leave it out, or name this text otherwise: --valid-data-path NAME=PREFIX"
                )


def evaluate_members(members: list[Trained], ranks: ParallelContext) -> dict:
    """Return the record of an evaluation on every validation set of the first member; on every process the same.

    Of each set it holds the figures of `Evaluation.summary` for the members, and for the ensembles of the first 1 to
    K of them. Data, noise and alignment are the first member's, the precision is each member's own.
    """
    first, validation = members[0], members[0].config.validation
    sources = open_sources(first.config)
    check_data(members, sources)
    vocabulary = first.vocabulary
    documents = document_rules(first.config.data, first.config.objective, sources.tokenizer.eod)
    objective = build_objective(first.config.objective, vocabulary, first.meta["time_block"], documents)
    exact = all(likelihood.exact for likelihood in objective.likelihoods)
    for line in no_op_flags(first.config, exact) if ranks.rank == 0 else ():
        logger.info(line)
    evaluations = [(data, *each) for data in sources.validation for each in objective.evaluations(data.name)]
    ensemble, sets = Ensemble([_engine(member, vocabulary, ranks) for member in members]), {}
    for data, name, likelihood in evaluations:
        found = evaluate(
            ensemble,
            likelihood,
            data,
            seed=validation.eval_seed,
            replicates=validation.num_mc,
            batch_size=validation.eval_batch_size or first.config.training.micro_batch_size,
            alignment=validation.eval_alignment,
            models=2 * len(members),
        )
        alone, together = found[: len(members)], found[len(members) :]
        for member, evaluation in zip(members, alone, strict=True):
            if not np.isfinite(evaluation.nats).all():
                raise ConfigurationError(f"{member.name}: its loss on {name} is not finite; leave it out")
        sets[name] = {
            "upper_bound": not likelihood.exact,
            "num_mc": 1 if likelihood.exact else validation.num_mc,
            "members": [evaluation.summary() for evaluation in alone],
            "ensembles": [
                {"size": size, **evaluation.summary(), **_gain(alone[:size], evaluation)}
                for size, evaluation in enumerate(together, start=1)
            ],
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
        "sets": sets,
    }


def _engine(member: Trained, vocabulary: Vocabulary, ranks: ParallelContext) -> Engine:
    """Return the engine of a member, at its weights; there is no optimizer."""
    config, bf16 = member.config, member.recorded["precision"] == "bf16"
    seed, parallel = config.training.seed, config.parallel
    engine = build_engine(config.model, vocabulary, seed, ranks, parallel, bf16=bf16, compile=False)
    weights = {f"model.{name}": parameter.detach() for name, parameter in engine.named_parameters()}
    checkpoint.load(member.checkpoint, weights)
    return engine


def _gain(members: list[Evaluation], ensemble: Evaluation) -> dict:
    """Return by how much, in nats per token, an ensemble is below the mean of its members' losses, and its data_se.

    Paired by document: what all models find hard in a text does not enter the error.
    """
    nats = np.mean([member.nats for member in members], axis=0) - ensemble.nats
    paired = Evaluation(nats, ensemble.tokens, ensemble.bytes).summary()
    return {"gain": paired["loss"], "gain_se": paired["data_se"]}


def table(record: dict) -> str:
    """Return the record as text: a table a set, and what its columns are."""
    lines, members = [], record["members"]
    for name, found in record["sets"].items():
        rows = [[f"{name} ({record['alignment']})", "nats per token", "bits/byte", "gain"]]
        for member, figures in zip(members, found["members"], strict=True):
            rows.append([f"{member['name']} step {member['iteration']}", *_cells(found, figures), ""])
        for figures in found["ensembles"][1:]:
            gain = f"{figures['gain']:.4f}" + (f" ± {figures['gain_se']:.4f}" if figures["gain_se"] else "")
            rows.append([f"the first {figures['size']} together", *_cells(found, figures), gain])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows] + [""]
    lines.append("Ensembles average probabilities, token by token. ±: standard error over documents; gain: how far an")
    lines.append("ensemble is below the mean of its members' losses, paired by document.")
    bounds = [found["num_mc"] for found in record["sets"].values() if found["upper_bound"]]
    if bounds:
        lines.append(
            f"≤: upper bounds of the negative log-likelihood, from {bounds[0]} noise replicates, the same for "
            "all; mc: their standard error."
        )
    return "\n".join(lines)


def _cells(found: dict, figures: dict) -> list[str]:
    loss, data_se, mc_se, bits = (figures[name] for name in FIGURES)
    bound = "≤ " * found["upper_bound"]
    errors = (f" ± {data_se:.4f}" if data_se else "") + (f" (mc {mc_se:.4f})" if mc_se else "")
    return [f"{bound}{loss:.4f}{errors}", f"{bound}{bits:.4f}" if bits else "-"]


def plot(record: dict, path: Path) -> None:
    """Draw loss against the number of members, a panel a set, as a PNG file that is there whole or not at all."""
    sets = record["sets"]
    figure, panels = pyplot().subplots(1, len(sets), figsize=(5.5 * len(sets), 4.2), squeeze=False)
    for axes, (name, found) in zip(panels[0], sets.items(), strict=True):
        sizes = [figures["size"] for figures in found["ensembles"]]
        losses, errors = zip(*((figures["loss"], figures["data_se"] or 0) for figures in found["ensembles"]))
        axes.errorbar(sizes, losses, yerr=errors, fmt="o-", capsize=4, label="the first N together")
        alone = [figures["loss"] for figures in found["members"]]
        axes.plot([1] * len(alone), alone, "x", color="gray", label="each alone")
        bound = ", upper bound" if found["upper_bound"] else ""
        axes.set(xlabel="members N", ylabel=f"nats per token{bound}", title=f"{name} (± over documents)")
        axes.set_xticks(sizes)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_png(figure, path)
