"""Figures of a report as data: curves with labels and intervals, which `plots` and `interactive` draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.reporting.groups import (
    DETAILED,
    Group,
    Summary,
    best_by_budget,
    headline,
    line_namer,
    omitted_note,
)
from megatron.reporting.runs import curve

EPOCHS = "epochs of the unique tokens"
FLOPS = "training FLOPs (6ND)"
LOSS = "validation loss, nats per token"
SEED_BAND = "Lines: mean over seeds; bands: from the lowest to the highest seed."
DOCUMENT_BARS = "Bars: ± one standard error over documents, which includes the evaluation noise."


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of one line, with an interval around each."""

    label: str  # shown on hover
    series: str  # entry of the legend; curves of a series share a colour
    x: np.ndarray  # [P]
    y: np.ndarray  # [P]
    low: np.ndarray | None = None  # [P]
    high: np.ndarray | None = None  # [P]
    dashed: bool = False
    markers: bool = False  # draw the points, too
    line: bool = True
    bound: bool = False  # upper bounds have triangles


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Curves over one x axis."""

    name: str  # of its files
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    note: str = ""  # what the bands or bars are
    bars: bool = False  # draw intervals as error bars, not as bands
    log_x: bool = True
    log_y: bool = False
    x_ticks: tuple[float, ...] = ()  # the ticks of x, if there are few values; () leaves them to the plot

    @property
    def series(self) -> list[str]:
        """The entries of the legend, in order."""
        return list(dict.fromkeys(curve.series for curve in self.curves))


def report_figures(rows: Sequence[Summary], validation: str) -> list[Figure]:
    """Return the figures of a comparison of runs; those without any curve are left out."""
    groups = [row.group for row in rows]
    figures = [
        loss_figure(rows, validation, "epoch", EPOCHS),
        loss_figure(rows, validation, "consumed_tokens", "training tokens", name="tokens"),
        loss_figure(rows, validation, "flops", FLOPS),
        budget_figure(rows),
        frontier_figure(rows, validation),
        training_figure(headline(rows), validation),
        gap_figure(groups, validation),
    ]
    return [figure for figure in figures if figure.curves]


def series_namer(groups: Sequence[Group]) -> Callable[[Group], str]:
    """Return the legend entry of a group: its label where groups are few, else its method."""
    if len(groups) <= DETAILED:
        return lambda group: group.label
    return lambda group: group.method


def loss_figure(rows: Sequence[Summary], validation: str, key: str, x_label: str, *, name: str = "") -> Figure:
    """Return validation losses against the field `key` of their records."""
    name_of = series_namer([row.group for row in rows])
    curves = []
    for row in rows:
        x, losses = over_seeds(row.group, validation, key, lambda record: record["loss"])
        bound = " (upper bound)" if row.bound else ""
        curves.append(seed_curve(x, losses, label=row.name + bound, series=name_of(row.group) + bound, markers=True))
    return Figure(
        name=f"validation_{name or key}",
        title=f"Validation loss against {x_label}",
        x_label=x_label,
        y_label=LOSS,
        curves=curves,
        note=_seed_note([row.group for row in rows]),
    )


def over_seeds(
    group: Group, validation: str, key: str, value: Callable[[dict], float | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return x [P] and values [R, P] of R seeds at the P steps that all of them have evaluated.

    Steps where `value` returns None for a seed are left out.
    """
    by_step = [{record["iteration"]: record for record in curve(run, validation)} for run in group.runs]
    steps = sorted(set.intersection(*(set(records) for records in by_step)))
    x, values = [], []
    for step in steps:
        column = [value(records[step]) for records in by_step]
        if None not in column:
            x.append(by_step[0][step][key])
            values.append(column)
    return np.array(x, dtype=float), np.array(values, dtype=float).reshape(-1, len(group.runs)).T


def seed_curve(x: np.ndarray, values: np.ndarray, *, label: str, series: str, markers: bool = False) -> Curve:
    """Return the mean of values [R, P] over R seeds at x [P], with the band of their lowest and highest."""
    several = len(values) > 1 and values.size > 0
    return Curve(
        label=label,
        series=series,
        x=x,
        y=values.mean(axis=0),
        low=values.min(axis=0) if several else None,
        high=values.max(axis=0) if several else None,
        markers=markers,
    )


def budget_figure(rows: Sequence[Summary]) -> Figure:
    """Return the best loss of every method against the planned epochs, a line for each number of unique tokens."""
    name_of = line_namer(rows)
    lines: dict[str, list[Summary]] = {}
    for row in best_by_budget(rows):
        lines.setdefault(name_of(row), []).append(row)
    curves = []
    for name, points in lines.items():
        losses = np.array([row.best.loss for row in points])
        errors = np.array([row.best.data_se or 0.0 for row in points])
        curves.append(
            Curve(
                label=name,
                series=name,
                x=np.array([row.group.planned_epochs for row in points]),
                y=losses,
                low=losses - errors,
                high=losses + errors,
                markers=True,
                bound=points[0].bound,
            )
        )
    return Figure(
        name="best",
        title="Best per method and budget of epochs",
        x_label="epochs of the budget",
        y_label=LOSS,
        curves=curves,
        note=f"{DOCUMENT_BARS} Triangles: upper bounds." + omitted_note(rows),
        bars=True,
    )


def frontier_figure(rows: Sequence[Summary], validation: str) -> Figure:
    """Return the best points against FLOPs, with the Pareto frontier of every method and number of unique tokens."""
    name_of = line_namer(rows)
    curves = []
    for name in dict.fromkeys(map(name_of, rows)):
        members = [row for row in rows if name_of(row) == name]
        points = sorted(members, key=lambda row: (row.best.flops, row.tuning_loss))
        frontier: list[Summary] = []
        for row in points:
            if not frontier or row.tuning_loss < frontier[-1].tuning_loss:
                frontier.append(row)
        if len(points) < 2:
            continue
        for kind, shown in (("best points", points), ("Pareto frontier", frontier)):
            curves.append(
                Curve(
                    label=f"{name}, {kind}",
                    series=name,
                    x=np.array([row.best.flops for row in shown]),
                    y=np.array([row.best.loss for row in shown]),
                    line=shown is frontier,
                    markers=shown is points,
                    bound=points[0].bound,
                )
            )
    return Figure(
        name="frontier",
        title="Best points against training FLOPs",
        x_label=FLOPS,
        y_label=LOSS,
        curves=curves,
        note="Markers: the best point of every run, or mean of seeds. Lines: the Pareto frontier of each method on the "
        f"{rows[0].tuning} set.",
    )


def training_figure(rows: Sequence[Summary], validation: str) -> Figure:
    """Return smoothed training losses (dashed) and validation losses against epochs, of the first seeds."""
    curves = []
    for row in rows:
        run = row.group.runs[0]
        train = run.train
        curves.append(Curve(label=f"{row.name}, training", series=row.name, x=train.epoch, y=train.loss, dashed=True))
        records = curve(run, validation)
        epochs, losses = (np.array([record[key] for record in records]) for key in ("epoch", "loss"))
        curves.append(Curve(label=f"{row.name}, validation", series=row.name, x=epochs, y=losses))
    return Figure(
        name="train_validation",
        title="Training and validation loss",
        x_label=EPOCHS,
        y_label="nats per token",
        curves=[curve for curve in curves if len(curve.x)],
        note="Dashed: training, smoothed, with corruption, dropout and label smoothing. Solid: validation. One seed.",
    )


def gap_figure(groups: Sequence[Group], validation: str) -> Figure:
    """Return the validation loss minus the mean training loss since the previous validation, against epochs."""
    name_of = series_namer(groups)

    def gap(record: dict) -> float | None:
        train = record["mean_train_loss"]
        return None if train is None else record["loss"] - train

    curves = []
    for group in groups:
        x, values = over_seeds(group, validation, "epoch", gap)
        if len(x):
            curves.append(seed_curve(x, values, label=group.label, series=name_of(group)))
    return Figure(
        name="gap",
        title="Gap of validation and training loss",
        x_label=EPOCHS,
        y_label="validation - training, nats per token",
        curves=curves,
        note="Training loss: mean since the previous validation, with corruption, dropout and label smoothing, so that "
        f"the gap may be negative. {_seed_note(groups)}".rstrip(),
    )


def _seed_note(groups: Sequence[Group]) -> str:
    return SEED_BAND if any(len(group.runs) > 1 for group in groups) else ""
