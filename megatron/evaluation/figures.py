"""Plots of evaluations: drawn without a display, and a file that is there whole or not at all."""

from pathlib import Path


def pyplot():
    """Return matplotlib's pyplot, which is slow to load, for a machine without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots


def save_png(figure, path: Path) -> None:
    """Write a figure as a PNG file and close it."""
    aside = path.with_name(path.name + ".partial")
    figure.savefig(aside, format="png", dpi=120, bbox_inches="tight")
    pyplot().close(figure)
    aside.replace(path)
