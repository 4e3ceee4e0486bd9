"""What other tools have computed, as figures and tables of a report: fitted laws, data multipliers, downstream scores.

A report draws these files and computes nothing from them:

fit.json          tools/fit_scaling_laws.py --output DIR
multiplier JSON   tools/data_multiplier.py --json FILE
scores.json       tools/score_checkpoints.py --output DIR
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import ConfigurationError
from megatron.reporting.figures import EPOCHS, LOSS, Curve, Figure
from megatron.reporting.plots import metrics, progress_axis

NO_STATEMENT = "no statement"


@dataclass(frozen=True)
class Table:
    """A table of a report with its heading and what explains it."""

    title: str
    headings: tuple[str, ...]
    lines: list[list[str]]
    note: str


@dataclass(frozen=True)
class Attachments:
    """Tables and figures of files that a report includes."""

    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def read_attachments(fits: Sequence[Path], multipliers: Sequence[Path], scores: Sequence[Path]) -> Attachments:
    """Return the tables and figures of fit.json, multiplier and scores.json files.

    Raises: ConfigurationError for a file that cannot be read or is of another kind.
    """
    attachments = Attachments()
    for number, path in enumerate(fits, 1):
        read_record(path, "--fit", "tools/fit_scaling_laws.py", lambda record, n=number: _laws(record, n, attachments))
    for number, path in enumerate(multipliers, 1):
        read_record(
            path,
            "--multiplier",
            "tools/data_multiplier.py",
            lambda record, n=number: _multiplier(record, n, attachments),
        )
    records = [read_record(path, "--scores", "tools/score_checkpoints.py", _scored) for path in scores]
    attachments.figures.extend(_scores(records))
    return attachments


def read_record(path: Path, flag: str, tool: str, use: Callable[[dict], Any]) -> Any:
    """Return what `use` makes of a JSON file that `tool` wrote; `flag` names it, if not empty.

    Raises: ConfigurationError for a file that cannot be read or is of another kind.
    """
    source = f"{flag} {path}".strip()
    try:
        return use(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigurationError(
            f"{source}: cannot be read ({error.strerror}); give the JSON file that {tool} wrote"
        ) from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise ConfigurationError(f"{source}: is no record of {tool}; give the JSON file that it wrote") from None


# ------------------------------------------------------------------------------------ fitted laws


def _laws(record: dict, number: int, attachments: Attachments) -> None:
    """Add the parameters and curves of every fit of a fit.json."""
    figures = 0
    for fit in record["fits"]:
        attachments.tables.append(_parameters(record, fit))
        budgets = list(dict.fromkeys(curve["unique_tokens"] for curve in fit["curves"]))
        for budget in budgets:
            figures += 1
            attachments.figures.append(_law_figure(fit, budget, f"law_{number}_{figures}_{fit['form']}"))


def _parameters(record: dict, fit: dict) -> Table:
    """Return the fitted values of a form with their intervals; a parameter that diverged has no value."""
    lines = []
    for name, parameter in fit["parameters"].items():
        value = "-" if parameter["value"] is None else f"{parameter['value']:.4g}"
        status = "frozen" if parameter["frozen"] else parameter["status"]
        intervals = [_interval(parameter[kind], ".4g", "unbounded") for kind in ("bootstrap", "profile")]
        lines.append([name, value, *intervals, status])
    level = f"{100 * fit['level']:g}%"
    filters = "; ".join(record["filters"]) or "none"
    note = f"{fit['equation']} ({fit['source']}). {record['table']}, filters: {filters}; "
    note += f"{len(fit['residuals']['loss'])} rows; base {fit['base'] or 'fitted'}; R² of log losses {fit['r2']:.4f}."
    if fit["diverged"]:
        note += f" The fit diverged ({', '.join(fit['diverged'])}): the law has no curve."
    return Table(
        title=f"Fitted law: {fit['form']}",
        headings=("parameter", "value", f"{level} bootstrap", f"{level} profile", "status"),
        lines=lines,
        note=note,
    )


def _interval(ends: Sequence[float | None] | None, form: str, open_end: str) -> str:
    """Return an interval as text; `open_end` stands for a None end."""
    if ends is None:
        return "-"
    low, high = (open_end if end is None else f"{end:{form}}" for end in ends)
    return f"[{low}, {high}]"


def _law_figure(fit: dict, budget: float, name: str) -> Figure:
    """Return the curves of a law for one number of unique tokens, with the runs they were fitted to."""
    curves = []
    for curve in fit["curves"]:
        if curve["unique_tokens"] != budget:
            continue
        size = f"{curve['parameters'] / 1e6:.4g}M parameters"
        low, high = (None if curve[end] is None else np.array(curve[end]) for end in ("low", "high"))
        x, y = np.array(curve["epochs"]), np.array(curve["loss"])
        curves.append(Curve(label=f"{size}, law", series=size, x=x, y=y, low=low, high=high))
        x, y = (np.array(curve["runs"][key], dtype=float) for key in ("epochs", "loss"))
        if len(x):
            curves.append(Curve(label=f"{size}, run", series=size, x=x, y=y, line=False, markers=True))
    bands = f" Bands: {100 * fit['level']:g}% of {fit['resamples']} bootstrap resamples." if fit["resamples"] else ""
    return Figure(
        name=name,
        title=f"Law {fit['form']}, {budget:,.0f} unique tokens",
        x_label=EPOCHS,
        y_label="loss, nats per token",
        curves=curves,
        note=f"Lines: the fitted law; markers: runs.{bands}",
    )


# ------------------------------------------------------------------------------------ data multiplier


def _multiplier(record: dict, number: int, attachments: Attachments) -> None:
    """Add the answers of a data multiplier with its baseline, and both sides against unique tokens."""
    baseline, method = record["baseline"], record["method"]
    lines = []
    for answer in record["answers"]:
        lines.append(
            [
                f"{answer['unique_tokens']:,.0f}",
                f"{'≤ ' if method['bound'] else ''}{answer['loss']:.4f}",
                "-" if answer["baseline_tokens"] is None else f"{answer['baseline_tokens']:,.0f}",
                _times(answer, baseline["bound"], method["bound"]),
                _interval(answer["interval"], ".3g", "outside the range"),
                answer["how"],
            ]
        )
    note = f"Method: {method['name']}. Baseline: {baseline['name']}: {baseline['recipe']}; {record['interpolation']} "
    note += "interpolation. The multiplier is how many times more unique tokens the baseline needs for the same loss; "
    note += "interval: 95% over seeds."
    stated = dict.fromkeys(answer.get("caveat") or NO_STATEMENT for answer in record["answers"])
    caveats = [caveat for caveat in stated if not caveat.startswith(NO_STATEMENT)]  # the others are in the table
    note += "".join(f" {caveat[0].upper()}{caveat[1:]}." for caveat in caveats)
    headings = ("unique tokens", "loss", "baseline needs", "multiplier", "interval", "how")
    attachments.tables.append(Table(title="Data multiplier", headings=headings, lines=lines, note=note))
    curves = []
    for side, points in ((baseline, baseline["points"]), (method, record["answers"])):
        name = side["name"] + (" (upper bound)" if side["bound"] else "")
        x, y = (np.array([point[key] for point in points], dtype=float) for key in ("unique_tokens", "loss"))
        curves.append(Curve(label=name, series=name, x=x, y=y, markers=True, bound=side["bound"]))
    figure = Figure(
        name=f"multiplier_{number}",
        title="Data multiplier: loss against unique tokens",
        x_label="unique tokens",
        y_label=LOSS,
        curves=curves,
        note="The multiplier is the horizontal distance from the method to the baseline.",
    )
    attachments.figures.append(figure)


def _times(answer: dict, baseline_is_bound: bool, method_is_bound: bool) -> str:
    """Return a multiplier as text with the sign that upper bounds give it, or the limit of the measured baseline.

    A lower loss of the method raises the multiplier and a lower loss of the baseline lowers it.
    """
    if answer["multiplier"] is not None:
        sign = {(False, True): ">= ", (True, False): "<= "}.get((baseline_is_bound, method_is_bound), "")
        sign = str(answer.get("sign", sign)).replace(">=", "≥").replace("<=", "≤").strip()
        return f"{sign} {answer['multiplier']:.3g}x".lstrip()
    kind = "more" if answer["more_than"] is not None else "less"
    side = "baseline" if kind == "more" else "method"  # whose loss must be exact for the statement to hold
    if baseline_is_bound if side == "baseline" else method_is_bound:
        return f"{NO_STATEMENT} (the {side}'s loss is an upper bound)"
    return f"{kind} than {answer[f'{kind}_than']:.3g}x"


# ------------------------------------------------------------------------------------ downstream scores


def _scored(record: dict) -> dict[str, dict[str, list]]:
    """Return checkpoints, scores and standard errors of a run by task and metric."""
    scores = {}
    for task, first_results in record["points"][0]["results"].items():
        if not metrics(first_results):  # a group of tasks
            continue
        metric = metrics(first_results)[0]
        name, _, kind = metric.partition(",")
        columns: dict[str, Any] = {"run": str(record["run"]), "points": [], "values": [], "errors": []}
        for point in record["points"]:
            results = point["results"][task]
            error = results.get(f"{name}_stderr,{kind}")
            columns["points"].append({key: point[key] for key in ("epoch", "iteration")})
            columns["values"].append(results[metric])
            columns["errors"].append(error if isinstance(error, float) else 0.0)
        scores[f"{task} {name}"] = columns
    return scores


def _scores(records: list[dict[str, dict[str, list]]]) -> list[Figure]:
    """Return a figure for every task and metric, a curve for every run."""
    figures = []
    for number, task in enumerate(dict.fromkeys(task for record in records for task in record), 1):
        runs = [record[task] for record in records if task in record]
        key, label = progress_axis([point for columns in runs for point in columns["points"]])
        curves = []
        for columns in runs:
            run = str(columns["run"])
            x = np.array([point[key] for point in columns["points"]], dtype=float)
            y, errors = (np.array(columns[name], dtype=float) for name in ("values", "errors"))
            curves.append(Curve(label=run, series=run, x=x, y=y, low=y - errors, high=y + errors, markers=True))
        figures.append(
            Figure(
                name=f"scores_{number}",
                title=f"Downstream: {task} against {label}",
                x_label=label,
                y_label=task,
                curves=curves,
                note="Bars: ± one standard error over the documents of the task.",
                bars=True,
            )
        )
    return figures
