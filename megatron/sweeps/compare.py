"""Compares the points of a collected sweep with a baseline, seed by seed.

1. The best step of a run is that of its lowest loss on the tuning set; its loss there on the validation set is
   reported. Budgets, tuned flags or other columns may be chosen by that loss, too (`best_over`). A second likelihood
   is a set of its own, such as validation.mdm of a dual run.
2. A point is compared with the baseline point that has the same values of all other columns: same seed, same samples.
3. The difference is the mean over the shared seeds, with the standard error of that mean over seeds; without a shared
   seed it is the difference of the means, with the root of the sum of their squared errors. Neither contains the
   sampling of documents nor, for masked diffusion, that of masks, which are the same for both.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.csv

from megatron.errors import ConfigurationError
from megatron.sweeps.results import COST_COLUMNS, POINT_COLUMNS, RECORD_COLUMNS, RUN_COLUMNS

TABLE = "results.csv"
COMPARABLE = (*RUN_COLUMNS, "alignment", "num_mc")  # equal, or the losses are of different things
HEADER = ("best loss", "se", "epoch", "runs", "difference", "se", "lower")


@dataclass(frozen=True)
class Best:
    """A run at its best step on the tuning set."""

    loss: float  # on the validation set, nats per token
    epoch: float
    is_bound: bool  # the loss is an upper bound


@dataclass(frozen=True)
class Comparison:
    """A point of the sweep over its seeds, next to the baseline."""

    names: dict[str, str]  # variant and axes
    runs: dict[str, Best]  # by seed
    baseline: dict[str, Best]  # the runs of the baseline; none for the baseline itself

    def cells(self) -> list[str]:
        """Return the point as the cells of a table."""
        losses = [run.loss for run in self.runs.values()]
        epoch = fmean(run.epoch for run in self.runs.values())
        sign = "<= " if any(run.is_bound for run in self.runs.values()) else ""
        cells = [*self.names.values(), f"{sign}{fmean(losses):.4f}", _error(losses), f"{epoch:.1f}", str(len(losses))]
        return [*cells, *self._difference()]

    def _difference(self) -> list[str]:
        """Return the difference to the baseline, its standard error, and for how many seeds it is negative, as text."""
        if not self.baseline:
            return ["-", "-", "-"]
        paired = [run.loss - self.baseline[seed].loss for seed, run in self.runs.items() if seed in self.baseline]
        if paired:
            lower = sum(difference < 0 for difference in paired)
            return [f"{fmean(paired):+.4f}", _error(paired), f"{lower} of {len(paired)}"]
        sides = [[run.loss for run in runs.values()] for runs in (self.runs, self.baseline)]
        difference = fmean(sides[0]) - fmean(sides[1])
        if min(map(len, sides)) == 1:
            return [f"{difference:+.4f}", "-", "unpaired"]
        return [f"{difference:+.4f}", f"{math.hypot(*map(_standard_error, sides)):.4f}", "unpaired"]


def _error(values: Sequence[float]) -> str:
    """Return the standard error of a mean as text; - where there is one value."""
    return f"{_standard_error(values):.4f}" if len(values) > 1 else "-"


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results.csv, or of the one in a sweep folder, as text.

    Raises: ConfigurationError where it is missing or has not the columns of `collect`.
    """
    path = path / TABLE if path.is_dir() else path
    if not path.is_file():
        raise ConfigurationError(f"{path}: is missing; tools/sweep.py collect SWEEP writes it")
    try:
        names = pyarrow.csv.open_csv(path).schema.names
        convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        rows = pyarrow.csv.read_csv(path, convert_options=convert).to_pylist()
    except pa.ArrowInvalid as error:
        raise ConfigurationError(f"{path}: is not a table ({str(error).splitlines()[0]}); collect it again") from None
    missing = [name for name in (*POINT_COLUMNS, *COMPARABLE, *RECORD_COLUMNS) if name not in names]
    if missing:
        raise ConfigurationError(f"{path}: has no column {missing[0]}; collect it again with this version")
    return rows


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows of a table are compared, and how a run's best step is chosen."""

    tuning: str = "tuning"  # the set that chooses
    validation: str = "validation"  # the set whose losses are reported
    variants: str = "*"  # a pattern
    where: Mapping[str, str] = field(default_factory=dict)  # values of columns that rows have
    best_over: Sequence[str] = ()  # columns whose best value is taken, such as budgets and tuned flags


def compare(rows: Sequence[dict[str, str]], baseline: dict[str, str], selection: Selection) -> list[Comparison]:
    """Return every selected point, in the table's order, next to the baseline.

    `baseline` has the values of some columns, such as {"num-loops": "1"} or {"variant": "ar"}.

    Raises: ConfigurationError for a column or value that the table lacks, a set without validations, and losses that
    cannot be compared.
    """
    tuning, validation = selection.tuning, selection.validation
    rows = _selected(rows, selection)
    columns = _columns(rows)
    baseline = {name: _text(value) for name, value in baseline.items()}
    for name in selection.best_over:
        if name not in columns:
            raise ConfigurationError(f"--best-over {name}: names no column; give one of {', '.join(columns)}")
    columns = [name for name in columns if name not in selection.best_over]
    for name, value in baseline.items():
        _check_value(rows, columns, f"--baseline {name}={value}")
    for set_name in (tuning, validation):
        chosen = [row for row in rows if row["set"] == set_name]
        if not chosen:
            sets = ", ".join(dict.fromkeys(row["set"] for row in rows))
            raise ConfigurationError(f"{set_name}: is no set of the table; give --tuning and --validation of {sets}")
        _check_comparable(chosen, set_name)
    best = _best(rows, columns, tuning, validation)
    if not best:
        raise ConfigurationError(f"{tuning}, {validation}: no run has losses of both sets at one step; give other sets")
    comparisons = []
    for key, runs in best.items():
        names = dict(zip(columns, key, strict=True))
        base = tuple((names | baseline).values())
        comparisons.append(Comparison(names, runs, {} if base == key else best.get(base, {})))
    return comparisons


def unfinished(rows: Sequence[dict[str, str]], selection: Selection) -> list[str]:
    """Return a line on the selected runs that have not finished; none if all have."""
    states = {row["id"]: row["state"] for row in _selected(rows, selection)}
    counts = Counter(state for state in states.values() if state != "finished")
    if not counts:
        return []
    listed = ", ".join(f"{count} {state}" for state, count in counts.items())
    return [
        f"{counts.total()} of {len(states)} runs have not finished ({listed}): they are taken at the best of their "
        "steps so far; --where state=finished leaves them out"
    ]


def _selected(rows: Sequence[dict[str, str]], selection: Selection) -> list[dict[str, str]]:
    """Return the rows of the variants and values that a selection names.

    Raises: ConfigurationError for a pattern without a variant, and a column or value that the table lacks.
    """
    selected = [row for row in rows if fnmatch(row["variant"], selection.variants)]
    if not selected:
        raise ConfigurationError(
            f"--variants {selection.variants}: matches no variant of the table; see its column variant"
        )
    columns = [*_columns(selected), "state"]
    for name, value in selection.where.items():
        _check_value(selected, columns, f"--where {name}={value}")
        selected = [row for row in selected if _text(row[name]) == _text(value)]
    return selected


def _check_value(rows: Sequence[dict[str, str]], columns: Sequence[str], setting: str) -> None:
    """Check that some row has the value of a column that a setting names, such as "--where stage=final".

    Raises: ConfigurationError otherwise.
    """
    name, _, value = setting.partition(" ")[2].partition("=")
    if name not in columns:
        raise ConfigurationError(f"{setting}: names no column; give one of {', '.join(columns)}")
    if _text(value) not in {_text(row[name]) for row in rows}:
        raise ConfigurationError(f"{setting}: no run has that value of {name}; see the table")


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return the comparisons as a Markdown table; columns with one value only are left out."""
    names = [name for name in comparisons[0].names if len({entry.names[name] for entry in comparisons}) > 1]
    lines = [[*names, *HEADER]]
    for entry in comparisons:
        lines.append(Comparison({name: entry.names[name] for name in names}, entry.runs, entry.baseline).cells())
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    separator = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], separator, *text[1:]])


def _columns(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the columns that tell points apart: stage, variant, trial, and the axes and tuned flags."""
    known = {*POINT_COLUMNS, *RUN_COLUMNS, *COST_COLUMNS, *RECORD_COLUMNS}
    return ["stage", "variant", "trial", *(name for name in rows[0] if name not in known)]


def _text(value: Any) -> str:
    """Return a cell or a value of a flag as text: equal numbers as the same text, 25_000 and 2.5e4 as 25000."""
    try:
        return f"{float(value):.15g}"
    except (TypeError, ValueError):
        return value or ""


def _best(
    rows: Sequence[dict[str, str]], columns: Sequence[str], tuning: str, validation: str
) -> dict[tuple[str, ...], dict[str, Best]]:
    """Return each run at its best step, by point and seed; runs without both sets at that step have none."""
    losses: dict[tuple, dict[str, dict[tuple, dict[str, Best]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        key = tuple(_text(row[name]) for name in columns)
        step = losses[key][row["seed"]].setdefault((row["id"], row["iteration"]), {})
        step[row["set"]] = Best(float(row["loss"]), float(row["epoch"]), row["bound"].lower() == "true")
    best: dict[tuple[str, ...], dict[str, Best]] = {}
    for key, seeds in losses.items():
        for seed, steps in seeds.items():
            both = [sets for sets in steps.values() if tuning in sets and validation in sets]
            if both:
                best.setdefault(key, {})[seed] = min(both, key=lambda sets: sets[tuning].loss)[validation]
    return best


def _check_comparable(rows: Sequence[dict[str, str]], set_name: str) -> None:
    """Check that the losses of a set are of the same text and, for bounds, of the same noise.

    Raises: ConfigurationError otherwise.
    """
    for name in COMPARABLE:
        by_bound: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            by_bound[row["bound"] if name == "num_mc" else ""].add(row[name])
        values = next((values for values in by_bound.values() if len(values) > 1), None)
        if values:
            raise ConfigurationError(
                f"{set_name}: its losses differ in {name} ({', '.join(sorted(values))}) and cannot be compared; "
                "give --variants that share it"
            )
