"""Plots of fitted scaling laws: curves over epochs, residuals, profiles of parameters; PNG and SVG, written atomically.

They draw a record of fit.json and compute nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron.laws.table import short
from megatron.reporting.plots import COLOURS, pyplot

EPOCHS = "epochs of the unique tokens"
COLUMNS = 3  # of panels


def plot_fit(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots of one form's record as FORM_curves, FORM_residuals and FORM_profiles; return the PNG files.

    A fit that diverged has no curves.
    """
    name = record["form"]
    paths = []
    if record["curves"]:
        paths.append(_save(_curves(record), folder / f"{name}_curves"))
    paths.append(_save(_residuals(record), folder / f"{name}_residuals"))
    if record["profiles"]:
        paths.append(_save(_profiles(record), folder / f"{name}_profiles"))
    return paths


def _save(figure, path: Path) -> Path:
    """Write a figure as PATH.png and PATH.svg and close it; return the PNG file."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is computed once, not per file
    for suffix in ("svg", "png"):
        partial = path.with_name(f"{path.name}.{suffix}.partial")
        figure.savefig(partial, format=suffix, dpi=120)
        partial.replace(path.with_name(f"{path.name}.{suffix}"))
    pyplot().close(figure)
    return path.with_name(f"{path.name}.png")


def _panels(number: int, height: float):
    """Return a figure with `number` panels, and its axes."""
    columns = min(COLUMNS, number)
    rows = -(-number // columns)
    figure, axes = pyplot().subplots(rows, columns, figsize=(4.2 * columns, height * rows), squeeze=False)
    for unused in axes.flat[number:]:
        unused.set_visible(False)
    figure.set_layout_engine("constrained")
    return figure, axes.flat[:number]


def _log_axis(axes) -> None:
    """Give a panel a logarithmic x axis with labels such as 10 and 100M: ten times as fast as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 10 * low:  # not even one power of ten
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) if value >= 1000 else f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)


def _curves(record: dict[str, Any]):
    """Draw loss against epochs, a panel per budget and a colour per size; the band is that of the bootstrap."""
    budgets = list(dict.fromkeys(curve["unique_tokens"] for curve in record["curves"]))
    figure, panels = _panels(len(budgets), 3.3)
    for axes, budget in zip(panels, budgets, strict=True):
        curves = [curve for curve in record["curves"] if curve["unique_tokens"] == budget]
        for curve, colour in zip(curves, COLOURS, strict=False):
            axes.plot(curve["epochs"], curve["loss"], color=colour, label=f"{short(curve['parameters'])} parameters")
            if curve["low"] is not None:
                axes.fill_between(curve["epochs"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
            axes.plot(curve["runs"]["epochs"], curve["runs"]["loss"], "o", ms=4, color=colour)
        losses = np.concatenate([[*curve["loss"], *curve["runs"]["loss"]] for curve in curves])
        margin = 0.05 * (losses.max() - losses.min()) + 1e-3
        axes.set_ylim(losses.min() - margin, losses.max() + margin)  # a band may be far wider
        axes.set(xlabel=EPOCHS, ylabel="nats per token", title=f"{short(budget)} unique tokens")
        _log_axis(axes)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    band = f", {100 * record['level']:g}% band of the bootstrap" if record["resamples"] else ""
    figure.suptitle(f"{record['form']}: law and runs{band}")
    return figure


def _residuals(record: dict[str, Any]):
    """Draw observed minus predicted loss against epochs, parameters and unique tokens."""
    rows = {name: np.array(values) for name, values in record["residuals"].items()}
    errors = rows["loss"] - rows["predicted"]
    variables = (
        (rows["tokens"] / rows["unique_tokens"], EPOCHS),
        (rows["parameters"], "parameters"),
        (rows["unique_tokens"], "unique tokens"),
    )
    figure, panels = _panels(len(variables), 3.0)
    for axes, (values, label) in zip(panels, variables, strict=True):
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.plot(values, errors, "o", ms=3, alpha=0.6, color=COLOURS[0])
        axes.set(xlabel=label, ylabel="observed - predicted, nats")
        _log_axis(axes)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{record['form']}: residuals of {len(errors)} runs")
    return figure


def _profiles(record: dict[str, Any]):
    """Draw the likelihood-ratio statistic of each fitted parameter near its best value."""
    figure, panels = _panels(len(record["profiles"]), 2.6)
    for axes, (name, profile) in zip(panels, record["profiles"].items(), strict=True):
        values, statistics = np.array(profile["values"]), np.array(profile["statistics"])
        axes.plot(values, statistics, "o-", ms=3, color=COLOURS[0])
        parameter = record["parameters"][name]
        ends = [end for end in parameter["profile"] if end is not None]
        for end in ends:
            axes.axvline(end, color="gray", linestyle="--", linewidth=0.8)
        axes.axvline(parameter["value"], color=COLOURS[1], linewidth=0.8)
        shown = values[statistics <= 15]
        axes.set(ylim=(-0.5, 15), xlim=(shown.min() / 1.1, shown.max() * 1.1))
        _log_axis(axes)
        axes.set(xlabel=f"{name} ({parameter['status']})", ylabel="statistic")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{record['form']}: profile likelihoods, {100 * record['level']:g}% intervals dashed")
    return figure
