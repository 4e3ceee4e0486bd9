"""Iso-loss contours over model size and epochs, interpolated between runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.reporting.groups import Summary, lowest, omitted_note

RESOLUTION = 80  # grid points of an axis
LEVELS = 8


@dataclass(frozen=True, kw_only=True)
class ContourFigure:
    """Contours of one method: lines of equal loss, and the runs between which they are interpolated."""

    name: str
    title: str
    x: np.ndarray  # [P] epochs of the runs
    y: np.ndarray  # [P] parameters
    loss: np.ndarray  # [P] nats per token
    labels: list[str]  # [P]
    lines: list[tuple[float, np.ndarray]]  # level, points [K, 2] of (epochs, parameters)
    x_label: str = "epochs of the budget"
    y_label: str = "parameters"
    note: str = ""


def contour_figures(rows: Sequence[Summary]) -> list[ContourFigure]:
    """Return the contours of every method and number of unique tokens that has a grid of sizes and epochs."""
    keys = dict.fromkeys((row.group.method, row.unique_tokens) for row in rows)
    figures = []
    for method, unique in keys:
        members = [row for row in rows if (row.group.method, row.unique_tokens) == (method, unique)]
        title = f"Iso-loss contours, {method}, {unique:,} unique tokens"
        if any(row.bound for row in members):
            title += " (upper bounds)"
        figure = _contours(members, f"iso_loss_{len(figures) + 1}", title)
        figures += [figure] if figure else []
    return figures


def _contours(rows: Sequence[Summary], name: str, title: str) -> ContourFigure | None:
    """Return the contours of the finished rows; None where they are no grid of at least two sizes by two budgets."""
    finished = [row for row in rows if row.group.finished]
    best = lowest(finished, lambda row: (row.group.config["parameters"], row.group.planned_epochs))
    sizes = np.array([row.group.config["parameters"] for row in best], dtype=float)
    epochs = np.array([row.group.planned_epochs for row in best], dtype=float)
    loss = np.array([row.best.loss for row in best])
    lines = contour_lines(np.log(epochs), np.log(sizes), loss)
    if not lines:
        return None
    return ContourFigure(
        name=name,
        title=title,
        x=epochs,
        y=sizes,
        loss=loss,
        labels=[row.name for row in best],
        lines=[(level, np.exp(points)) for level, points in lines],
        note=f"Loss on the {rows[0].reported} set at the best point of each run. Best points, and the best run of each "
        f"size and number of epochs, are chosen on the {rows[0].tuning} set. Lines: equal loss, linear between "
        "neighbouring runs on logarithmic axes; nothing is fitted. Star: the lowest loss." + omitted_note(rows),
    )


def contour_lines(x: np.ndarray, y: np.ndarray, values: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Return (level, points [K, 2]) of contours of `values` [P] at scattered points, linear between them.

    No line where the points span no area or all values are equal.
    """
    from contourpy import contour_generator
    from matplotlib.ticker import MaxNLocator
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import QhullError

    if min(len(set(x)), len(set(y))) < 2:
        return []
    grid_x = np.linspace(x.min(), x.max(), RESOLUTION)
    grid_y = np.linspace(y.min(), y.max(), RESOLUTION)
    try:
        surface = LinearNDInterpolator(np.stack([x, y], axis=1), values, rescale=True)
    except (QhullError, ValueError):  # fewer than three points, or all on a line
        return []
    generator = contour_generator(grid_x, grid_y, np.ma.masked_invalid(surface(*np.meshgrid(grid_x, grid_y))))
    levels = MaxNLocator(LEVELS).tick_values(values.min(), values.max())
    return [(float(level), np.asarray(points)) for level in levels for points in generator.lines(level)]
