"""Groups of runs that differ in their seed only, their best points, and the best group of every method and budget.

A method is a sweep's variant, or else the objective with its regularisers. The best point of a run is chosen on the
tuning set and reported on the validation set, and so is the best group.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.reporting.runs import (
    Difference,
    Evaluation,
    Run,
    best_records,
    curve,
    has_documents,
    mean_difference,
    mean_nats,
)
from megatron.statistics import clustered_ratio, noise_error

# fields of the section `data` that do not change a result
PATHS = ("num_workers", "train_data_path", "train_data_path_file", "valid_data_path", "valid_data_path_file")
DETAILED = 10  # groups up to which each is described, compared with all others, and named in legends


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    label: str
    method: str
    runs: list[Run]

    @property
    def config(self) -> dict:
        """The configuration of the first run."""
        return self.runs[0].config

    @property
    def finished(self) -> bool:
        """Return whether all runs have finished."""
        return all(run.finished for run in self.runs)

    @property
    def planned_epochs(self) -> float:
        """The budget in epochs, rounded to three digits."""
        seq_length = self.config["data"]["seq_length"]
        return float(f"{self.config['train_samples'] * seq_length / self.config['unique_tokens']:.3g}")


@dataclass(frozen=True)
class SeedMean:
    """Validation records of all seeds of a group, averaged."""

    evaluations: list[Evaluation]
    epoch: float
    tokens: float
    flops: float
    loss: float
    low: float  # the lowest loss of a seed
    high: float
    # of the mean over these seeds; upper bounds, the means of the seeds' errors, where sums by document are missing
    data_se: float | None  # over documents
    mc_se: float | None  # over noise
    bits_per_byte: float | None

    @property
    def is_last(self) -> bool:
        """Return whether the records are the last ones of their runs."""
        return all(record is run.valid[record["set"]][-1] for run, record in self.evaluations)


@dataclass(frozen=True)
class Summary:
    """One row of the table of best points."""

    group: Group
    objective: str
    regularisers: str
    bound: bool  # losses are upper bounds
    tuning: str  # the set on which the best point was chosen
    tuning_loss: float  # at the best point, by which groups are compared
    best: SeedMean
    last: SeedMean
    gap: Difference  # last - best; without a standard error where sums by document are missing

    @property
    def name(self) -> str:
        """The label of the group."""
        return self.group.label

    @property
    def reported(self) -> str:
        """The set whose losses are reported."""
        return self.best.evaluations[0][1]["set"]

    @property
    def unique_tokens(self) -> int:
        """The number of unique tokens of the training data."""
        return self.group.config["unique_tokens"]

    @property
    def sign(self) -> str:
        """What precedes a loss: ≤ where it is an upper bound."""
        return "≤ " if self.bound else ""


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Return the groups of runs with equal settings but for their seed, in the order of their first runs."""
    members: dict[tuple, list[Run]] = {}
    for run in runs:
        key = (run.point.method, run.point.label, _settings(run)) if run.point else (_settings(run),)
        seed, copies = run.config["training"]["seed"], 0
        while any(other.config["training"]["seed"] == seed for other in members.get((*key, copies), ())):
            copies += 1  # the same seed twice is another run, not another seed
        members.setdefault((*key, copies), []).append(run)
    return [_group(group) for group in members.values()]


def _group(runs: list[Run]) -> Group:
    first = runs[0]
    if first.point:
        return Group(label=first.point.label, method=first.point.method, runs=runs)
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    return Group(label=first.name + seeds, method=f"{objective_label(first)}, {first.regularisers()}", runs=runs)


def objective_label(run: Run) -> str:
    """Return the objective of a run as text."""
    name = str(run.config["objective_name"])
    return {"ar": "AR", "mdm": "MDM"}.get(name, name)


def _settings(run: Run) -> str:
    """Return what the runs of a group share."""
    config = run.config
    data = {name: value for name, value in config["data"].items() if name not in PATHS}
    sections = [data, *(config[name] for name in ("model", "objective", "optimizer"))]
    if config.get("teachers"):
        weights = None if run.point else [teacher["weights"] for teacher in config["teachers"]]
        sections += [config["distillation"] | {"teacher": weights}]
    budget = [config.get(name) for name in ("train_samples", "unique_tokens", "precision")]
    # a sweep names its branches and students; those of each seed may have a trunk and teachers of that seed
    origin = None if run.point else config.get("branched_from")
    training = [config["training"].get(name) for name in ("global_batch_size", "fp8_recipe")]
    return json.dumps([sections, budget, origin, training], sort_keys=True)


def seed_mean(evaluations: list[Evaluation]) -> SeedMean:
    """Return the mean of one validation record of each seed.

    The mean of the seeds' errors is an upper bound of the error of their mean, whatever noise they share.
    """
    records = [record for _, record in evaluations]

    def mean(name: str) -> float | None:
        values = [record[name] for record in records]
        return None if None in values else float(np.mean(values))

    data_se, mc_se = mean("data_se"), mean("mc_se")
    if len(records) > 1 and has_documents(evaluations):
        (nats,), tokens = mean_nats(evaluations)
        data_se = clustered_ratio(nats, tokens).standard_error
        noise = noise_error(nats, tokens)  # all seeds are evaluated with the same noise
        mc_se = mc_se if noise is None else noise
    losses = [record["loss"] for record in records]
    return SeedMean(
        evaluations=evaluations,
        epoch=float(np.mean([record["epoch"] for record in records])),
        tokens=float(np.mean([record["consumed_tokens"] for record in records])),
        flops=float(np.mean([record["flops"] for record in records])),
        loss=float(np.mean(losses)),
        low=min(losses),
        high=max(losses),
        data_se=data_se,
        mc_se=mc_se,
        bits_per_byte=mean("bits_per_byte"),
    )


def summarise(group: Group, tuning: str, validation: str) -> Summary:
    """Return the best and the last losses of a group on `validation`, and their difference paired by document.

    Raises: ConfigurationError if a run has no such set or no step on both sets.
    """
    pairs = [best_records(run, tuning, validation) for run in group.runs]
    best = seed_mean([(run, record) for run, (_, record) in zip(group.runs, pairs)])
    last = seed_mean([(run, curve(run, validation)[-1]) for run in group.runs])
    if best.is_last:
        gap = Difference(0.0, 0.0)
    elif has_documents([*last.evaluations, *best.evaluations]):
        gap = mean_difference(last.evaluations, best.evaluations)
    else:
        gap = Difference(last.loss - best.loss, None)
    return Summary(
        group=group,
        objective=objective_label(group.runs[0]),
        regularisers=group.runs[0].regularisers(),
        bound=any(run.is_bound(validation) for run in group.runs),
        tuning=tuning,
        tuning_loss=float(np.mean([record["loss"] for record, _ in pairs])),
        best=best,
        last=last,
        gap=gap,
    )


def lowest(rows: Sequence[Summary], key: Callable[[Summary], object]) -> list[Summary]:
    """Return the row with the lowest loss on the tuning set for every value of `key`, in the order of the values."""
    best: dict[object, Summary] = {}
    for row in rows:
        if key(row) not in best or row.tuning_loss < best[key(row)].tuning_loss:
            best[key(row)] = row
    return list(best.values())


def headline(rows: Sequence[Summary]) -> list[Summary]:
    """Return the rows that are described and compared.

    All if they are few, else the best one of every method and number of unique tokens.
    """
    return list(rows) if len(rows) <= DETAILED else lowest(rows, lambda row: (row.group.method, row.unique_tokens))


def line_namer(rows: Sequence[Summary]) -> Callable[[Summary], str]:
    """Return the name of the line that a row is on: its method, and its unique tokens where they differ."""
    if len({row.unique_tokens for row in rows}) > 1:
        return lambda row: f"{row.group.method}, {row.unique_tokens:,} unique tokens"
    return lambda row: row.group.method


def best_by_budget(rows: Sequence[Summary]) -> list[Summary]:
    """Return the best finished row of every method, number of unique tokens and planned epochs, ordered by them."""

    def budget(row: Summary) -> tuple:
        return row.unique_tokens, row.group.planned_epochs

    methods = list(dict.fromkeys(row.group.method for row in rows))
    best = lowest([row for row in rows if row.group.finished], lambda row: (row.group.method, *budget(row)))
    return sorted(best, key=lambda row: (methods.index(row.group.method), *budget(row)))


def omitted_note(rows: Sequence[Summary]) -> str:
    """Return how many rows are left out of a figure or table of finished groups; empty if none."""
    unfinished = sum(not row.group.finished for row in rows)
    return f" Unfinished groups are omitted: {unfinished} of {len(rows)}." if unfinished else ""
