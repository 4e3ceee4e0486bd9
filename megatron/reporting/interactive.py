"""Figures of a report in the browser: Bokeh, with hover and zoom, inline and without a network."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron.reporting.contours import ContourFigure
from megatron.reporting.figures import FLOPS, Curve, Figure
from megatron.reporting.plots import COLOURS, MAX_LEGEND, level_colours

if TYPE_CHECKING:
    from bokeh.plotting import figure

HEIGHT = 360  # pixels of a plot without its legend
LEGEND_ROW = 20  # pixels
MAX_BARS = 2000  # error bars and markers of a plot


@dataclass(frozen=True)
class Embedded:
    """What a page includes: the library, the data, and an element for every figure."""

    library: str  # <script> elements
    script: str  # <script> element with all data
    elements: list[str]  # in the order of the figures


def embed(figures: list[Figure | ContourFigure]) -> Embedded:
    """Return figures as HTML that needs nothing else."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    library = Resources(mode="inline", components=["bokeh"]).render_js()  # without widgets and TeX
    if not figures:
        return Embedded("", "", [])
    plots = [_contours(item) if isinstance(item, ContourFigure) else _curves(item) for item in figures]
    script, elements = components(plots)
    return Embedded(library, script, list(elements))


def _empty(item: Figure | ContourFigure, legend_rows: int, *, log_x: bool, log_y: bool) -> "figure":
    """Return a plot with axes and tools and nothing in it."""
    from bokeh.models import CustomJSTickFormatter
    from bokeh.plotting import figure

    plot = figure(
        height=HEIGHT + LEGEND_ROW * legend_rows,
        sizing_mode="stretch_width",
        x_axis_type="log" if log_x else "linear",
        y_axis_type="log" if log_y else "linear",
        x_axis_label=item.x_label,
        y_axis_label=item.y_label,
        tools="box_zoom,pan,wheel_zoom,reset",
        active_drag="box_zoom",
        active_scroll=None,  # the wheel scrolls the page
        min_border_right=12,
        output_backend="canvas",
    )
    plot.toolbar.logo = None
    # Bokeh's own labels of powers need TeX
    plot.xaxis.formatter = CustomJSTickFormatter(code=POWERS if item.x_label == FLOPS else AMOUNTS)
    if log_y:
        plot.yaxis.formatter = CustomJSTickFormatter(code=AMOUNTS)
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_font_style = "normal"
    return plot


POWERS = 'return tick.toExponential(1).replace(".0", "").replace("+", "");'
AMOUNTS = """
const digits = value => String(Number(value.toPrecision(4)));
for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]])
    if (tick >= size) return digits(tick / size) + unit;
return digits(tick);
"""


def _curves(item: Figure) -> "figure":
    """Return the plot of a figure: per entry of the legend one glyph for all lines, and one each for the rest."""
    from bokeh.core.properties import value
    from bokeh.models import HoverTool, Legend, LegendItem

    entries = item.series if len(item.series) <= MAX_LEGEND else []
    plot = _empty(item, len(entries), log_x=item.log_x, log_y=item.log_y)
    items, hovered = [], []
    for series, colour in zip(item.series, COLOURS * len(item.series)):
        members = [curve for curve in item.curves if curve.series == series]
        glyphs = _intervals(plot, members, colour, bars=item.bars)
        for dashed in (False, True):
            lines = [curve for curve in members if curve.dashed == dashed and curve.line and len(curve.x) > 1]
            if lines:
                glyph = plot.multi_line(
                    "xs",
                    "ys",
                    source=_lines(lines),
                    color=colour,
                    line_width=1.8,
                    line_dash="dashed" if dashed else "solid",
                )
                glyphs.append(glyph)
        glyphs += _markers(plot, members, colour)
        hovered += [glyph for glyph in glyphs if "label" in glyph.data_source.data]
        if glyphs and entries:
            items.append(LegendItem(label=value(series), renderers=glyphs))
    tooltips = [("", "@label"), (item.x_label, "$snap_x{0.[000]a}"), (item.y_label, "$snap_y{0.0000}")]
    plot.add_tools(HoverTool(renderers=hovered, tooltips=tooltips, line_policy="nearest"))
    if items:
        row = LEGEND_ROW - 4
        legend = Legend(
            items=items,
            click_policy="hide",
            ncols=1,
            location="left",
            label_text_font_size="11px",
            border_line_color=None,
            margin=0,
            spacing=2,
            glyph_height=row,
            label_height=row,
        )
        legend.update(padding=2)
        plot.add_layout(legend, "below")
    return plot


def _lines(curves: list[Curve]):
    from bokeh.models import ColumnDataSource

    data = {
        "xs": [_small(curve.x) for curve in curves],
        "ys": [_small(curve.y) for curve in curves],
        "label": [curve.label for curve in curves],
    }
    return ColumnDataSource(data)


def _intervals(plot: "figure", curves: list[Curve], colour: str, *, bars: bool) -> list:
    """Draw bands, or error bars; return the glyphs."""
    from bokeh.models import ColumnDataSource

    bands = [(curve.x, curve.low, curve.high) for curve in curves if curve.low is not None and curve.high is not None]
    if not bands:
        return []
    if bars:
        x, low, high = (_small(np.concatenate(column)) for column in zip(*bands))
        return [plot.segment(x0=x, y0=low, x1=x, y1=high, color=colour, line_width=1.4)]
    xs = [_small(np.concatenate([x, x[::-1]])) for x, _, _ in bands]
    ys = [_small(np.concatenate([low, high[::-1]])) for _, low, high in bands]
    source = ColumnDataSource({"xs": xs, "ys": ys})
    return [plot.patches("xs", "ys", source=source, color=colour, alpha=0.18, line_alpha=0)]


def _markers(plot: "figure", curves: list[Curve], colour: str) -> list:
    """Draw the points of curves that show them or have one only; return the glyphs."""
    from bokeh.models import ColumnDataSource

    glyphs = []
    for bound in (False, True):
        marked = [c for c in curves if c.bound == bound and (c.markers or len(c.x) == 1)]
        if not 0 < sum(len(curve.x) for curve in marked) <= MAX_BARS:
            marked = [curve for curve in marked if not curve.line or len(curve.x) == 1]
        if not marked:
            continue
        data = {
            "x": _small(np.concatenate([curve.x for curve in marked])),
            "y": _small(np.concatenate([curve.y for curve in marked])),
            "label": [curve.label for curve in marked for _ in curve.x],
        }
        marker = "inverted_triangle" if bound else "circle"
        glyphs.append(plot.scatter("x", "y", source=ColumnDataSource(data), marker=marker, size=5, color=colour))
    return glyphs


def _contours(item: ContourFigure) -> "figure":
    """Return the plot of a contour figure; lines show their level, points their run and loss."""
    from bokeh.models import ColumnDataSource, HoverTool

    plot = _empty(item, 0, log_x=True, log_y=True)
    colours = level_colours(item)
    data = {
        "xs": [_small(points[:, 0]) for _, points in item.lines],
        "ys": [_small(points[:, 1]) for _, points in item.lines],
        "colour": [colours[level] for level, _ in item.lines],
        "level": [f"loss {level:.4g}" for level, _ in item.lines],
    }
    lines = plot.multi_line("xs", "ys", source=ColumnDataSource(data), color="colour", line_width=2)
    middles = [points[len(points) // 2] for _, points in item.lines]
    text = {
        "x": [x for x, _ in middles],
        "y": [y for _, y in middles],
        "colour": data["colour"],
        "text": [f"{level:.4g}" for level, _ in item.lines],
    }
    plot.text(
        "x",
        "y",
        text="text",
        source=ColumnDataSource(text),
        color="colour",
        text_font_size="11px",
        text_align="center",
        text_baseline="bottom",
    )
    lowest = np.arange(len(item.loss)) == item.loss.argmin()
    for chosen, marker, size in ((~lowest, "circle", 6), (lowest, "star", 15)):
        points = {
            "x": _small(item.x[chosen]),
            "y": _small(item.y[chosen]),
            "loss": _small(item.loss[chosen]),
            "label": [label for label, is_chosen in zip(item.labels, chosen) if is_chosen],
        }
        runs = plot.scatter("x", "y", source=ColumnDataSource(points), marker=marker, size=size, color="#444")
        plot.add_tools(HoverTool(renderers=[runs], tooltips=[("", "@label"), ("loss", "@loss{0.0000}")]))
    plot.add_tools(HoverTool(renderers=[lines], tooltips=[("", "@level")], line_policy="nearest"))
    return plot


def _small(values: np.ndarray) -> np.ndarray:
    """Return values in 32 bits, which is more than a screen shows; FLOPs beyond its range keep 64."""
    values = np.asarray(values, dtype=np.float64)
    fits = not values.size or np.abs(values).max() < np.finfo(np.float32).max
    return values.astype(np.float32) if fits else values
