"""Plots of runs, ensembles and downstream scores, without a display; PNG files are written atomically.

Names are shown literally: matplotlib omits labels that start with _ from a legend, and renders text between two $ as a
formula.
"""

from pathlib import Path

import numpy as np

from megatron.reporting.runs import Run, curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's palette
EPOCHS = "epochs of the unique tokens"


def pyplot():
    """Return matplotlib's pyplot, imported on first use because it is slow, with a backend without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_png(figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically, and close it."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    pyplot().close(figure)
    partial.replace(path)


def literal(*texts) -> None:
    """Show texts of a plot literally, `$` included."""
    for text in texts:
        text.set_parse_math(False)


def add_legend(axes, entries: list[tuple]) -> None:
    """Add a legend of (artist, name) entries, with every name shown literally."""
    artists, names = zip(*entries, strict=True)
    # matplotlib hides labels that start with _, so the names are set afterwards
    texts = axes.legend(artists, ["name"] * len(artists), frameon=False).get_texts()
    literal(*texts)
    for text, name in zip(texts, names, strict=True):
        text.set_text(name)


# ------------------------------------------------------------------------------------ runs


def plot_runs(runs: list[Run], rows: list[dict], folder: Path, validation: str) -> dict[str, Path]:
    """Draw the plots of a report as PNG files in `folder`; return title -> file.

    `rows` are the rows of the report's table, `validation` is the set whose losses are plotted.
    """
    epochs = folder / "validation_epoch.png"
    flops = folder / "validation_flops.png"
    training = folder / "train_validation.png"
    best = folder / "best.png"
    return {
        _plot_validation(runs, validation, "epoch", EPOCHS, path=epochs): epochs,
        _plot_validation(runs, validation, "flops", "training FLOPs (6ND)", path=flops): flops,
        _plot_training(runs, validation, training): training,
        _plot_best_points(rows, best): best,
    }


def _plot_validation(runs: list[Run], validation: str, key: str, xlabel: str, *, path: Path) -> str:
    """Draw validation losses against the field `key` of their records; return the title."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    legend = []
    for run, colour in zip(runs, COLOURS * len(runs)):
        records = curve(run, validation)
        losses = [record["loss"] for record in records]
        (line,) = axes.plot([record[key] for record in records], losses, "o-", ms=3, color=colour)
        legend.append((line, run.name + (" (upper bound)" if run.is_bound(validation) else "")))
    add_legend(axes, legend)
    axes.set(xlabel=xlabel, xscale="log")
    return _save_losses(figure, axes, f"Validation loss against {xlabel}", path)


def _plot_training(runs: list[Run], validation: str, path: Path) -> str:
    """Draw smoothed training losses and validation losses against epochs; return the title."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    legend = []
    for run, colour in zip(runs, COLOURS * len(runs)):
        (line,) = axes.plot(*_smooth(run.train), "--", color=colour, alpha=0.7)
        legend.append((line, f"{run.name}, training"))
        records = curve(run, validation)
        losses = [record["loss"] for record in records]
        (line,) = axes.plot([record["epoch"] for record in records], losses, "-", color=colour)
        legend.append((line, f"{run.name}, validation"))
    add_legend(axes, legend)
    axes.set(xlabel=EPOCHS, xscale="log")
    return _save_losses(figure, axes, "Training (dashed, with corruption and dropout) and validation", path)


def _plot_best_points(rows: list[dict], path: Path) -> str:
    """Draw the best point of each run with its standard error; return the title."""
    figure, axes = pyplot().subplots(figsize=(7, 3))
    for index, (row, colour) in enumerate(zip(rows, COLOURS * len(rows))):
        best = row["best"]
        # the standard error over documents already includes the evaluation noise
        axes.errorbar(
            index, best["loss"], yerr=best["data_se"] or 0, fmt="v" if row["bound"] else "o", color=colour, capsize=4
        )
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    literal(*axes.get_xticklabels())
    axes.set_xlim(-0.5, len(rows) - 0.5)
    return _save_losses(figure, axes, "Best points with standard errors (triangle: upper bound)", path)


def _save_losses(figure, axes, title: str, path: Path) -> str:
    """Write a plot of losses as a PNG file; return its title."""
    axes.set(ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    save_png(figure, path)
    return title


def _smooth(train: list[dict], points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and losses averaged over at most `points` equal intervals of the run."""
    epochs, losses = np.array([[record["epoch"], record["loss"]] for record in train]).T
    intervals = np.array_split(np.arange(len(epochs)), min(points, len(epochs)))
    return np.array([epochs[i].mean() for i in intervals]), np.array([losses[i].mean() for i in intervals])


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
    """Write a PNG file with the first metric of each task against epochs; error bars are over documents.

    `record` holds lm-eval's results for the checkpoints of a run: {"run", "points": [{"epoch", "results"}]}.
    """
    figure, axes = pyplot().subplots(figsize=(6, 4.2))
    epochs = [point["epoch"] for point in record["points"]]
    legend = []
    for task in record["points"][0]["results"]:
        metric = first_metric(record["points"][0]["results"][task])
        values = [point["results"][task][metric] for point in record["points"]]
        name, kind = metric.split(",")
        errors = [point["results"][task].get(f"{name}_stderr,{kind}") for point in record["points"]]
        errors = [error if isinstance(error, float) else 0.0 for error in errors]
        legend.append((axes.errorbar(epochs, values, yerr=errors, fmt="o-", capsize=3), f"{task} {name}"))
    axes.set(xlabel="epochs", ylabel="score (± over documents)")
    literal(axes.set_title(record["run"]))
    axes.grid(alpha=0.3)
    add_legend(axes, legend)
    save_png(figure, path)


def first_metric(results: dict) -> str:
    """Return the name of the first metric of a task that has a value and is not a standard error."""
    return next(name for name, value in results.items() if "," in name and "_stderr" not in name and value is not None)
