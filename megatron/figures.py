"""Plots: drawn without a display, with names as they are written, in a file that is there whole or not at all.

matplotlib leaves labels that begin with _ out of a legend and sets what stands between two $ as a formula.
"""

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


def literal(*texts) -> None:
    """Show texts of a plot as they are, `$` included."""
    for text in texts:
        text.set_parse_math(False)


def add_legend(axes, names: list[tuple]) -> None:
    """Add a legend of (artist, name), with every name as it is."""
    artists, labels = zip(*names, strict=True)
    # what a label begins with decides whether matplotlib shows it, so the names come after
    texts = axes.legend(artists, ["name"] * len(artists), frameon=False).get_texts()
    literal(*texts)
    for text, label in zip(texts, labels, strict=True):
        text.set_text(label)
