"""Plots of runs, ensembles and downstream scores, without a display; files are written atomically.

Names are shown literally: matplotlib omits labels that start with _ from a legend, and renders text between two $ as a
formula.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.reporting.contours import ContourFigure
from megatron.reporting.figures import Curve, Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's palette
COLOURS += ("#332288", "#882255", "#999933", "#44AA99", "#661100", "#888888")  # mostly Paul Tol's muted scheme
MAX_LEGEND = 12  # entries, each of another colour
LEGEND_ROW = 0.2  # inches of an entry
MAX_MARKED = 50  # curves whose points are marked


def pyplot():
    """Return matplotlib's pyplot, imported on first use because it is slow, with a backend without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_png(figure, path: Path, bbox: str | None = "tight") -> None:
    """Write a figure as a PNG file, atomically, and close it; `bbox` as of savefig."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120, bbox_inches=bbox)
    pyplot().close(figure)
    partial.replace(path)


def save_svg(figure, path: Path) -> None:
    """Write a figure as an SVG file with texts as text, atomically; equal figures give equal files."""
    partial = path.with_name(path.name + ".partial")
    with pyplot().rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(partial, format="svg", metadata={"Date": None})
    partial.replace(path)


def literal(*texts) -> None:
    """Show texts of a plot literally, `$` included."""
    for text in texts:
        text.set_parse_math(False)


def add_legend(picture, entries: list[tuple]) -> None:
    """Add a legend of (artist, name) entries below the axes, which the picture grows by; names are shown literally."""
    artists, names = zip(*entries, strict=True)
    picture.set_layout_engine("constrained")
    picture.set_figheight(picture.get_figheight() + LEGEND_ROW * len(entries))
    # matplotlib hides labels that start with _, so the names are set afterwards
    legend = picture.legend(artists, ["name"] * len(artists), frameon=False, loc="outside lower left", fontsize="small")
    literal(*legend.get_texts())
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


# ------------------------------------------------------------------------------------ runs


def draw(figure: Figure, folder: Path) -> list[Path]:
    """Write a figure of a report as NAME.svg and NAME.png; return their paths."""
    picture, axes = pyplot().subplots(figsize=(7, 4.5))
    colours = dict(zip(figure.series, COLOURS * len(figure.series)))
    for series, colour in colours.items():
        _draw_series(axes, [curve for curve in figure.curves if curve.series == series], colour, figure)
    axes.autoscale_view()
    axes.set(xscale="log" if figure.log_x else "linear", yscale="log" if figure.log_y else "linear")
    if figure.x_ticks:
        axes.set_xticks([], minor=True)
        axes.set_xticks(figure.x_ticks, [f"{tick:g}" for tick in figure.x_ticks])
    if len(colours) <= MAX_LEGEND:
        handles = [axes.plot([], [], color=colour)[0] for colour in colours.values()]
        add_legend(picture, list(zip(handles, colours)))
    return _save(picture, axes, figure, folder)


def _draw_series(axes, curves: Sequence[Curve], colour: str, figure: Figure) -> None:
    """Draw the curves of one entry of the legend, as few artists, since there may be hundreds."""
    from matplotlib.collections import LineCollection, PolyCollection

    bands = [(curve.x, curve.low, curve.high) for curve in curves if curve.low is not None and curve.high is not None]
    if bands and figure.bars:
        bars = [[(x, low), (x, high)] for band in bands for x, low, high in zip(*band)]
        axes.add_collection(LineCollection(bars, colors=colour, linewidths=1.2))
    elif bands:
        shapes = [_outline(x, low, high) for x, low, high in bands]
        axes.add_collection(PolyCollection(shapes, facecolors=colour, alpha=0.2, linewidths=0))
    for dashed in (False, True):
        lines = [np.stack([c.x, c.y], axis=1) for c in curves if c.line and c.dashed == dashed]
        style = "--" if dashed else "-"
        axes.add_collection(LineCollection(lines, colors=colour, linestyles=style, linewidths=1.4, alpha=0.9))
    crowded = len(figure.curves) > MAX_MARKED
    for bound in (False, True):
        marked = [c for c in curves if c.bound == bound and ((c.markers and not (crowded and c.line)) or len(c.x) == 1)]
        if marked:
            x, y = (np.concatenate([getattr(curve, name) for curve in marked]) for name in ("x", "y"))
            axes.plot(x, y, linestyle="", marker="v" if bound else "o", ms=3.5, color=colour)


def _outline(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the corners [2P, 2] of a band."""
    return np.stack([np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]])], axis=1)


def draw_contours(figure: ContourFigure, folder: Path) -> list[Path]:
    """Write contours as NAME.svg and NAME.png; return their paths."""
    picture, axes = pyplot().subplots(figsize=(7, 4.5))
    colours = level_colours(figure)
    for level, points in figure.lines:
        axes.plot(points[:, 0], points[:, 1], "-", color=colours[level], lw=1.4)
        middle = points[len(points) // 2]
        axes.annotate(f"{level:.4g}", middle, fontsize=8, ha="center", va="center", color=colours[level])
    axes.plot(figure.x, figure.y, "o", ms=3.5, color="#444")
    lowest = figure.loss.argmin()
    axes.plot(figure.x[lowest], figure.y[lowest], "*", ms=14, color="#444")
    axes.set(xscale="log", yscale="log")
    return _save(picture, axes, figure, folder)


def level_colours(figure: ContourFigure) -> dict[float, str]:
    """Return a colour for every level of a contour figure, dark for low losses."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    levels = sorted({level for level, _ in figure.lines})
    return {
        level: to_hex(colormaps["viridis"](0.9 * index / max(1, len(levels) - 1))) for index, level in enumerate(levels)
    }


def _save(picture, axes, figure: Figure | ContourFigure, folder: Path) -> list[Path]:
    """Write a picture with the texts of its figure as SVG and PNG files; return their paths."""
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    literal(axes.set_title(figure.title, wrap=True))
    axes.grid(alpha=0.3)
    picture.set_layout_engine("constrained")
    paths = [folder / f"{figure.name}.svg", folder / f"{figure.name}.png"]
    save_svg(picture, paths[0])
    picture.set_layout_engine("none")  # the same layout again
    save_png(picture, paths[1], bbox=None)
    return paths


# ------------------------------------------------------------------------------------ ensembles, downstream scores


def plot_ensembles(record: dict, path: Path) -> None:
    """Write a PNG file of loss against the number of members, one panel per set; `record` is that of an evaluation."""
    sets = record["sets"]
    figure, panels = pyplot().subplots(1, len(sets), figsize=(5.5 * len(sets), 4.2), squeeze=False)
    for axes, (name, results) in zip(panels[0], sets.items(), strict=True):
        sizes = [summary["size"] for summary in results["ensembles"]]
        losses, errors = zip(*((summary["loss"], summary["data_se"] or 0) for summary in results["ensembles"]))
        axes.errorbar(sizes, losses, yerr=errors, fmt="o-", capsize=4, label="the first N together")
        single_losses = [summary["loss"] for summary in results["members"]]
        axes.plot([1] * len(single_losses), single_losses, "x", color="gray", label="each member")
        bound = ", upper bound" if results["upper_bound"] else ""
        axes.set(xlabel="members N", ylabel=f"nats per token{bound}", title=f"{name} (± over documents)")
        axes.set_xticks(sizes)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_png(figure, path)


def plot_task_scores(record: dict, path: Path) -> None:
    """Write a PNG file with the first metric of each task against progress; error bars are over documents.

    `record` holds lm-eval's results for the checkpoints of a run: {"run", "points": [{"epoch", ..., "results"}]}.
    """
    figure, axes = pyplot().subplots(figsize=(6, 4.2))
    key, label = progress_axis(record["points"])
    progress = [point[key] for point in record["points"]]
    legend = []
    for task, results in record["points"][0]["results"].items():
        if not metrics(results):  # a group of tasks
            continue
        metric = metrics(results)[0]
        values = [point["results"][task][metric] for point in record["points"]]
        name, _, kind = metric.partition(",")
        errors = [point["results"][task].get(f"{name}_stderr,{kind}") for point in record["points"]]
        errors = [error if isinstance(error, float) else 0.0 for error in errors]
        legend.append((axes.errorbar(progress, values, yerr=errors, fmt="o-", capsize=3), f"{task} {name}"))
    axes.set(xlabel=label, ylabel="score (± over documents)")
    literal(axes.set_title(record["run"]))
    axes.grid(alpha=0.3)
    if legend:
        add_legend(figure, legend)
    save_png(figure, path)


def progress_axis(points: Sequence[dict]) -> tuple[str, str]:
    """Return the key and the label of the progress of scored checkpoints: steps where a run's data are unknown."""
    return ("iteration", "steps") if any(point["epoch"] is None for point in points) else ("epoch", "epochs")


def metrics(results: dict) -> list[str]:
    """Return the names of the metrics of a task that have a value and are no standard errors."""
    return [name for name, value in results.items() if "," in name and "_stderr" not in name and value is not None]
