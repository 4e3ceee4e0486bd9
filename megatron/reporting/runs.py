"""Runs read back from their folders, and compared: the paired difference by document.

Best points are chosen on the tuning set and reported on the validation set. Two models are compared paired by
document: the ratio estimator sum(n1 - n2) / sum(tokens) with documents as clusters. What evaluation noise adds
differs from document to document, so that error holds it already.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron.errors import ConfigurationError
from megatron.training.run_folder import read_json, read_records

# what must agree before two losses stand in one table
SAME = {"corpus_hash": "corpus", "vocabulary_size": "vocabulary", "unique_tokens": "unique tokens"}

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
    """One run's folder, read."""

    name: str
    folder: Path
    config: dict
    train: list[dict]
    valid: dict[str, list[dict]]  # by set

    @property
    def finished(self) -> bool:
        return self.train[-1]["consumed_samples"] >= self.config["train_samples"]

    def is_bound(self, name: str) -> bool:
        """Return whether the losses on a validation set are upper bounds; a run may be older than that record."""
        return curve(self, name)[-1].get("bound", self.config["objective_name"] != "ar")

    def regularisers(self) -> str:
        settings = self.config["model"] | self.config["objective"]
        # a run that was begun before a flag existed has not used it
        said = [text.format(settings[name]) for name, text in REGULARISERS.items() if settings.get(name)]
        optimizer = self.config["optimizer"]
        decay = optimizer["weight_decay"]
        if optimizer.get("weight_decay_incr_style", "constant") != "constant":
            decay = f"{optimizer['start_weight_decay']} to {optimizer['end_weight_decay']}"
        said += ["Muon"] if optimizer.get("optimizer") == "muon" else []
        return ", ".join([*said, f"weight decay {decay}"])


@dataclass(frozen=True)
class Difference:
    """Nats per token by which one evaluation exceeds another, paired by document."""

    nats: float
    se: float

    @property
    def ratio(self) -> float:
        return self.nats / self.se if self.se else float("inf")


def load_runs(folders: list[str | Path]) -> list[Run]:
    """Read several runs and name each by the end of its path, as much of it as tells them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise ConfigurationError(f"{twice}: is given twice; a run is not compared with itself")
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    # a name on disk need not be UTF-8, and the page and its plots are
    names = [os.fsencode("/".join(path.parts[-parts:])).decode(errors="replace") for path in paths]
    return [replace(load_run(folder), name=name) for folder, name in zip(folders, names)]


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; raise ConfigurationError where it holds no validation."""
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
    return Run(folder.name, folder, config, [r for r in records if r["kind"] == "train"], valid)


def curve(run: Run, name: str) -> list[dict]:
    if name not in run.valid:
        raise ConfigurationError(f"{run.folder}: has no validation set {name}; it has {', '.join(run.valid)}")
    return run.valid[name]


def best_point(run: Run, tuning: str, reported: str) -> dict:
    """Return the record on `reported` at the step where `tuning` is lowest."""
    known = {record["iteration"]: record for record in curve(run, reported)}
    shared = [record for record in curve(run, tuning) if record["iteration"] in known]  # a run may still be going on
    if not shared:
        raise ConfigurationError(f"{run.folder}: has no step evaluated on both {tuning} and {reported}; wait for one")
    return known[min(shared, key=lambda record: record["loss"])["iteration"]]


def paired_difference(first: tuple[Run, dict], second: tuple[Run, dict]) -> Difference:
    """Return how much worse the first evaluation is than the second; each is (run, valid record)."""
    one, two = (_documents(*point) for point in (first, second))
    if not np.array_equal(one["tokens"], two["tokens"]):
        raise ConfigurationError(
            f"{first[0].folder} and {second[0].folder}: scored different tokens and cannot be paired"
        )
    tokens = one["tokens"].sum()
    nats = [np.atleast_2d(part["nats"]) for part in (one, two)]
    difference = nats[0].mean(0) - nats[1].mean(0)
    mean = difference.sum() / tokens
    seen = one["tokens"] > 0
    clusters = int(seen.sum())
    residual = (difference - mean * one["tokens"])[seen]
    variance = clusters / max(1, clusters - 1) * (residual**2).sum() / tokens**2
    return Difference(float(mean), float(np.sqrt(variance)))


def _documents(run: Run, record: dict):
    path = run.folder / "validation" / record["set"] / f"{record['iteration']}.npz"
    if not path.exists():
        raise ConfigurationError(f"{path}: is missing; a paired comparison needs it")
    return np.load(path)


def check_comparable(runs: list[Run]) -> None:
    """Refuse one table for runs on different text, vocabulary, unique tokens or alignment."""
    first = runs[0]
    for run in runs[1:]:
        for key, what in SAME.items():
            if run.config[key] != first.config[key]:
                raise ConfigurationError(
                    f"{first.folder} and {run.folder}: differ in {what} ({first.config[key]} and "
                    f"{run.config[key]}); report them apart"
                )
        if run.config["validation"]["eval_seed"] != first.config["validation"]["eval_seed"]:
            raise ConfigurationError(f"{first.folder} and {run.folder}: differ in --eval-seed; report them apart")
        alignments = {r["alignment"] for member in (first, run) for records in member.valid.values() for r in records}
        if len(alignments) > 1:
            raise ConfigurationError(
                f"{first.folder} and {run.folder}: differ in --eval-alignment {sorted(alignments)}; report them apart"
            )
