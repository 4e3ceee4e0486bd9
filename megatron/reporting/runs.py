"""Load runs from their folders and compare them by document.

Best points are chosen on the tuning set and reported on the validation set. The paired difference of two models is
sum(n1 - n2) / sum(tokens) over documents; n1 and n2 are a document's nats. Evaluation noise varies between documents,
so the standard error over documents includes it.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron import statistics
from megatron.errors import ConfigurationError
from megatron.reporting.methods import method_words
from megatron.training.run_folder import read_json, read_records

# config.json keys that must agree before two losses are compared
COMPARABLE_KEYS = {"corpus_hash": "corpus", "vocabulary_size": "vocabulary"}
TRAINING_POINTS = 60  # of a smoothed training curve


@dataclass(frozen=True)
class TrainingCurve:
    """Training losses of a run, averaged over at most TRAINING_POINTS equal intervals of its records."""

    epoch: np.ndarray  # [T]
    loss: np.ndarray  # [T] nats per token, with corruption and dropout


@dataclass(frozen=True)
class SweepPoint:
    """What a sweep's plan calls a run."""

    method: str  # the variant
    label: str  # variant and axes, without the seed


@dataclass(frozen=True)
class Run:
    """Configuration and records of a run folder."""

    name: str
    folder: Path
    config: dict
    train: TrainingCurve
    # validation records, by set; `mean_train_loss` is that of the training records since the validation before
    valid: dict[str, list[dict]]
    consumed_samples: int  # at the last record
    point: SweepPoint | None = None

    @property
    def finished(self) -> bool:
        """Return whether the run has consumed all samples of its budget."""
        return self.consumed_samples >= self.config["train_samples"]

    def is_bound(self, name: str) -> bool:
        """Return whether the losses on a validation set are upper bounds; older records only have their noise."""
        record = curve(self, name)[-1]
        return record.get("bound", record.get("mc_se") is not None)

    def regularisers(self) -> str:
        """Return the regularisers and techniques of the run and its weight decay, as text."""
        return method_words(self.config)


@dataclass(frozen=True)
class Difference:
    """Nats per token by which one evaluation exceeds another, paired by document."""

    nats: float
    se: float | None  # over documents; None where there is only one

    @property
    def ratio(self) -> float | None:
        """The difference in standard errors; None without one."""
        if self.nats == 0:
            return 0.0
        if self.se is None:
            return None
        return self.nats / self.se if self.se else math.copysign(math.inf, self.nats)

    def exceeds(self, standard_errors: float) -> bool:
        """Return whether the difference is larger than so many standard errors; never without one."""
        return self.ratio is not None and abs(self.ratio) > standard_errors


def load_runs(folders: Sequence[str | Path], progress: bool = False) -> list[Run]:
    """Load several runs; their names are the shortest path suffixes that distinguish them.

    Raises: ConfigurationError if a run is given twice or has no validation records.
    """
    names = distinguishing_names(folders)
    pairs = tqdm(zip(folders, names), desc="runs", total=len(names), disable=not progress, leave=False)
    return [replace(load_run(folder), name=name) for folder, name in pairs]


def distinguishing_names(folders: Sequence[str | Path]) -> list[str]:
    """Return the path suffixes of folders, of the smallest number of parts that makes them differ.

    Raises: ConfigurationError if a folder is given twice.
    """
    paths = refuse_duplicates(folders)
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    # the page and its plots are UTF-8, which file names need not be
    return [os.fsencode("/".join(path.parts[-depth:])).decode(errors="replace") for path in paths]


def refuse_duplicates(folders: Sequence[str | Path]) -> list[Path]:
    """Return the absolute paths of folders.

    Raises: ConfigurationError if a folder is given twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path, count in Counter(paths).items():
        if count > 1:
            raise ConfigurationError(f"{path}: is given twice; name it once, a run cannot be compared with itself")
    return paths


def distinct_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the runs, of those with one folder the first: points of a sweep may share a run."""
    first: dict[Path, Run] = {}
    for run in runs:
        first.setdefault(run.folder, run)
    return list(first.values())


def load_run(folder: str | Path) -> Run:
    """Load a run folder.

    Raises: ConfigurationError if it is not a run folder or has no validation records.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ConfigurationError(f"{folder}: holds no run (no config.json); give a folder that --save wrote")
    run = validated_run(folder)
    if run is None:
        raise ConfigurationError(f"{folder}: holds no validation record; train with --valid-data-path")
    return run


def validated_run(folder: Path, sets: Sequence[str] = ()) -> Run | None:
    """Return the run of a folder; None where there is none, or none with a step that was evaluated on all `sets`.

    Raises: ConfigurationError if config.json cannot be read.
    """
    records = read_records(folder)
    train = [(record["epoch"], record["loss"]) for record in records if record["kind"] == "train"]
    valid = _validations(records, np.array([loss for _, loss in train], dtype=np.float64))
    steps = [{record["iteration"] for record in valid.get(name, ())} for name in sets]
    if not valid or (steps and not set.intersection(*steps)):
        return None
    return Run(
        name=folder.name,
        folder=folder,
        config=read_json(folder / "config.json"),
        train=_smooth(train),
        valid=valid,
        consumed_samples=max(record.get("consumed_samples", 0) for record in records),
    )


def _validations(records: list[dict], losses: np.ndarray) -> dict[str, list[dict]]:
    """Return the validation records by set, with the mean loss of the training records since the one before.

    `losses` [T] are those of the training records.
    """
    valid: dict[str, list[dict]] = {}
    starts: dict[str, int] = {}  # by set, the first training loss after the previous validation
    count = 0
    for record in records:
        if record["kind"] == "train":
            count += 1
            continue
        recent = losses[starts.get(record["set"], 0) : count]
        starts[record["set"]] = count
        mean = float(recent.sum() / len(recent)) if len(recent) else None
        valid.setdefault(record["set"], []).append(record | {"mean_train_loss": mean})
    return valid


def _smooth(train: list[tuple[float, float]]) -> TrainingCurve:
    """Return (epoch, loss) pairs averaged over at most TRAINING_POINTS equal intervals."""
    values = np.array(train, dtype=np.float64).reshape(-1, 2)  # [T, 2]
    starts = np.unique(np.linspace(0, len(values), TRAINING_POINTS, endpoint=False).astype(int))
    if not len(values):
        return TrainingCurve(epoch=values[:, 0], loss=values[:, 1])
    counts = np.diff(np.append(starts, len(values)))
    epochs, losses = (np.add.reduceat(values, starts, axis=0) / counts[:, None]).T
    return TrainingCurve(epoch=epochs, loss=losses)


def curve(run: Run, name: str, flag: str = "--validation") -> list[dict]:
    """Return the records of a validation set, which `flag` names.

    Raises: ConfigurationError if the run has no such set.
    """
    if name not in run.valid:
        sets = ", ".join(run.valid)
        raise ConfigurationError(f"{run.folder}: has no validation set {name}; it has {sets}; choose one with {flag}")
    return run.valid[name]


def best_point(run: Run, tuning: str, reported: str) -> dict:
    """Return the record on the set `reported` at the step where the loss on the set `tuning` is lowest.

    Raises: ConfigurationError if no step was evaluated on both sets.
    """
    return best_records(run, tuning, reported)[1]


def best_records(run: Run, tuning: str, reported: str) -> tuple[dict, dict]:
    """Return the records on `tuning` and on `reported` at the step where the loss on the set `tuning` is lowest.

    Raises: ConfigurationError if no step was evaluated on both sets.
    """
    by_step = {record["iteration"]: record for record in curve(run, reported)}
    # a run that is still training may have evaluated a step on the first set only
    candidates = [record for record in curve(run, tuning, "--tuning") if record["iteration"] in by_step]
    if not candidates:
        raise ConfigurationError(f"{run.folder}: has no step evaluated on both {tuning} and {reported}; wait for one")
    best = min(candidates, key=lambda record: record["loss"])
    return best, by_step[best["iteration"]]


# ------------------------------------------------------------------------------------ comparison by document

Evaluation = tuple[Run, dict]  # a run and one of its validation records


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """Return the excess loss of the first evaluation over the second; both are (run, validation record).

    Raises: ConfigurationError if they scored different tokens.
    """
    return mean_difference([first], [second])


def mean_difference(first: Sequence[Evaluation], second: Sequence[Evaluation]) -> Difference:
    """Return the excess of the mean loss of the first evaluations, of several seeds, over that of the second.

    The standard error is over documents, for these seeds.

    Raises: ConfigurationError if they scored different tokens.
    """
    (nats, others), tokens = mean_nats(first, second)
    difference = statistics.paired_difference(nats, others, tokens)
    return Difference(difference.value, difference.standard_error)


def mean_nats(*groups: Sequence[Evaluation]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the nats [R, D] of each group, averaged over its evaluations, and the tokens [D] of the D documents.

    A group has R Monte-Carlo samples, the same in all its evaluations.

    Raises: ConfigurationError if the evaluations scored different tokens.
    """
    tokens: np.ndarray | None = None
    means = []
    for evaluations in groups:
        nats = []
        for run, record in evaluations:
            sums = _documents(run, record)
            scored = sums["tokens"]  # [D]
            if tokens is not None and not np.array_equal(tokens, scored):
                raise ConfigurationError(
                    f"{groups[0][0][0].folder} and {run.folder}: scored different tokens and cannot be paired"
                )
            tokens = scored
            nats.append(np.atleast_2d(sums["nats"]))
        means.append(sum(nats[1:], nats[0]) / len(nats))
    assert tokens is not None
    return means, tokens


def has_documents(evaluations: Iterable[Evaluation]) -> bool:
    """Return whether the sums by document of all evaluations exist; archives of sweeps have none."""
    return all(_documents_path(run, record).exists() for run, record in evaluations)


def _documents(run: Run, record: dict):
    """Return the nats and token counts by document of a validation record."""
    path = _documents_path(run, record)
    if not path.exists():
        raise ConfigurationError(f"{path}: is missing; a paired comparison needs it")
    return np.load(path)


def _documents_path(run: Run, record: dict) -> Path:
    return run.folder / "validation" / record["set"] / f"{record['iteration']}.npz"


def check_comparable(runs: list[Run]) -> None:
    """Check that the runs can share one table.

    Raises: ConfigurationError if they differ in corpus, vocabulary, evaluation seed or alignment.
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
        alignments = _alignments(first) | _alignments(run)
        if len(alignments) > 1:
            raise ConfigurationError(
                f"{first.folder} and {run.folder}: differ in --eval-alignment {sorted(alignments)}; report them "
                "separately"
            )


def check_evaluations(runs: Sequence[Run], tuning: str, reported: str) -> None:
    """Check that all runs scored the same tokens of both sets, and upper bounds with equally many samples.

    Tokens are compared by document, at the last validation whose sums by document exist.

    Raises: ConfigurationError if they differ, or if a run has no such set.
    """
    for name, flag in {reported: "--validation", tuning: "--tuning"}.items():
        first: tuple[Run, np.ndarray] | None = None
        samples: tuple[Run, int] | None = None
        for run in runs:
            records = curve(run, name, flag)
            for num_mc in {record["num_mc"] for record in records if record.get("bound") and "num_mc" in record}:
                samples = samples or (run, num_mc)
                if num_mc != samples[1]:
                    raise ConfigurationError(
                        f"{samples[0].folder} and {run.folder}: differ in --num-mc ({samples[1]} and {num_mc}) on the "
                        f"set {name}; report them separately"
                    )
            record = next((record for record in reversed(records) if _documents_path(run, record).exists()), None)
            if record is None:
                continue
            tokens = _documents(run, record)["tokens"]
            first = first or (run, tokens)
            if not np.array_equal(first[1], tokens):
                raise ConfigurationError(
                    f"{first[0].folder} and {run.folder}: scored different tokens of the set {name}; evaluate them on "
                    "the same windows, or report them separately"
                )


def _alignments(run: Run) -> set[str]:
    return {record["alignment"] for records in run.valid.values() for record in records}
