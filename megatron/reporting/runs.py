"""Load runs from their folders and compare them by document.

Best points are chosen on the tuning set and reported on the validation set. The paired difference of two models is
sum(n1 - n2) / sum(tokens) over documents; n1 and n2 are a document's nats. Evaluation noise varies between documents,
so the standard error over documents includes it.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron import statistics
from megatron.errors import ConfigurationError
from megatron.training.run_folder import read_json, read_records

# config.json keys that must agree before two losses are compared
COMPARABLE_KEYS = {"corpus_hash": "corpus", "vocabulary_size": "vocabulary", "unique_tokens": "unique tokens"}

REGULARISERS = {
    "token_dropout": "token dropout {}",
    "token_dropout_max": "token dropout U(0, {})",
    "mlp_dropout": "MLP dropout {}",
    "attention_dropout": "attention dropout {}",
    "hidden_dropout": "hidden dropout {}",
    "embedding_dropout": "embedding dropout {}",
    "random_replacement": "random replacement {}",
    "masked_input_weight": "masked input {}",
    "randmask_ratio": "row masking {}",
    "stochastic_depth": "stochastic depth {}",
    "label_smoothing": "label smoothing {}",
    "z_loss": "z-loss {}",
}


@dataclass(frozen=True)
class Run:
    """Configuration and records of a run folder."""

    name: str
    folder: Path
    config: dict
    train: list[dict]  # training records
    valid: dict[str, list[dict]]  # validation records, by set

    @property
    def finished(self) -> bool:
        """Return whether the run has consumed all samples of its budget."""
        return self.train[-1]["consumed_samples"] >= self.config["train_samples"]

    def is_bound(self, name: str) -> bool:
        """Return whether the losses on a validation set are upper bounds; older records only have their noise."""
        record = curve(self, name)[-1]
        return record.get("bound", record.get("mc_se") is not None)

    def regularisers(self) -> str:
        """Return the regularisers of the run and its weight decay, as text."""
        settings = self.config["model"] | self.config["objective"]
        # .get: the config.json of an older run may lack newer flags
        names = [text.format(settings[name]) for name, text in REGULARISERS.items() if settings.get(name)]
        optimizer = self.config["optimizer"]
        decay = optimizer["weight_decay"]
        if optimizer.get("weight_decay_incr_style", "constant") != "constant":
            decay = f"{optimizer['start_weight_decay']} to {optimizer['end_weight_decay']}"
        if optimizer.get("optimizer") == "muon":
            names.append("Muon")
        return ", ".join([*names, f"weight decay {decay}"])


@dataclass(frozen=True)
class Difference:
    """Nats per token by which one evaluation exceeds another, paired by document."""

    nats: float
    se: float  # over documents; 0 where there is only one

    @property
    def ratio(self) -> float:
        """Return the difference in standard errors."""
        return self.nats / self.se if self.se else float("inf")


def load_runs(folders: list[str | Path]) -> list[Run]:
    """Load several runs; their names are the shortest path suffixes that distinguish them.

    Raises: ConfigurationError if a run is given twice or has no validation records.
    """
    paths = [Path(folder).resolve() for folder in folders]
    duplicate = next((path for path in paths if paths.count(path) > 1), None)
    if duplicate:
        raise ConfigurationError(f"{duplicate}: is given twice; a run cannot be compared with itself")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    # the page and its plots are UTF-8, which file names need not be
    names = [os.fsencode("/".join(path.parts[-depth:])).decode(errors="replace") for path in paths]
    return [replace(load_run(folder), name=name) for folder, name in zip(folders, names)]


def load_run(folder: str | Path) -> Run:
    """Load a run folder.

    Raises: ConfigurationError if it is not a run folder or has no validation records.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ConfigurationError(f"{folder}: holds no run (no config.json); give a folder that --save wrote")
    config = read_json(folder / "config.json")
    records = read_records(folder)
    valid = {}
    for record in records:
        if record["kind"] == "valid":
            valid.setdefault(record["set"], []).append(record)
    if not valid:
        raise ConfigurationError(f"{folder}: holds no validation record; train with --valid-data-path")
    train = [record for record in records if record["kind"] == "train"]
    return Run(name=folder.name, folder=folder, config=config, train=train, valid=valid)


def curve(run: Run, name: str) -> list[dict]:
    """Return the records of a validation set.

    Raises: ConfigurationError if the run has no such set.
    """
    if name not in run.valid:
        raise ConfigurationError(f"{run.folder}: has no validation set {name}; it has {', '.join(run.valid)}")
    return run.valid[name]


def best_point(run: Run, tuning: str, reported: str) -> dict:
    """Return the record on the set `reported` at the step where the loss on the set `tuning` is lowest.

    Raises: ConfigurationError if no step was evaluated on both sets.
    """
    by_step = {record["iteration"]: record for record in curve(run, reported)}
    # a run that is still training may have evaluated a step on the first set only
    candidates = [record for record in curve(run, tuning) if record["iteration"] in by_step]
    if not candidates:
        raise ConfigurationError(f"{run.folder}: has no step evaluated on both {tuning} and {reported}; wait for one")
    return by_step[min(candidates, key=lambda record: record["loss"])["iteration"]]


def paired_difference(first: tuple[Run, dict], second: tuple[Run, dict]) -> Difference:
    """Return the excess loss of the first evaluation over the second; both are (run, validation record).

    Raises: ConfigurationError if they scored different tokens.
    """
    documents = [_documents(*evaluation) for evaluation in (first, second)]
    tokens = documents[0]["tokens"]  # [D]
    if not np.array_equal(tokens, documents[1]["tokens"]):
        raise ConfigurationError(
            f"{first[0].folder} and {second[0].folder}: scored different tokens and cannot be paired"
        )
    nats = [np.atleast_2d(sums["nats"]) for sums in documents]  # [R, D], R Monte-Carlo samples
    difference = statistics.paired_difference(nats[0], nats[1], tokens)
    return Difference(difference.value, difference.standard_error or 0.0)


def _documents(run: Run, record: dict):
    """Return the nats and token counts by document of a validation record."""
    path = run.folder / "validation" / record["set"] / f"{record['iteration']}.npz"
    if not path.exists():
        raise ConfigurationError(f"{path}: is missing; a paired comparison needs it")
    return np.load(path)


def check_comparable(runs: list[Run]) -> None:
    """Check that the runs can share one table.

    Raises: ConfigurationError if they differ in corpus, vocabulary, unique tokens, evaluation seed or alignment.
    """
    first = runs[0]
    for run in runs[1:]:
        for key, description in COMPARABLE_KEYS.items():
            if run.config[key] != first.config[key]:
                raise ConfigurationError(
                    f"{first.folder} and {run.folder}: differ in {description} ({first.config[key]} and "
                    f"{run.config[key]}); report them separately"
                )
        if run.config["validation"]["eval_seed"] != first.config["validation"]["eval_seed"]:
            raise ConfigurationError(f"{first.folder} and {run.folder}: differ in --eval-seed; report them separately")
        alignments = {
            record["alignment"] for pair in (first, run) for records in pair.valid.values() for record in records
        }
        if len(alignments) > 1:
            raise ConfigurationError(
                f"{first.folder} and {run.folder}: differ in --eval-alignment {sorted(alignments)}; report them "
                "separately"
            )
