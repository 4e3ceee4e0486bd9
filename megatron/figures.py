"""Plots without a display; PNG files are written atomically, and names are shown literally.

matplotlib omits labels that start with _ from a legend and renders text between two $ as a formula.
"""

from pathlib import Path


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
