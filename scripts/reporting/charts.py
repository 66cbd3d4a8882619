"""Drawings for a page: matplotlib's SVG, whose colours are the page's own, so that they follow its light or dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Points = Sequence[tuple[float, float]]

# Inches: as wide as a phone, so that the text has its own size there; on a desk there are several in a line.
_SIZE = (4.6, 2.9)
_MOST_POINTS = 400
_NUM_SERIES = 7
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # hollow, so that those that coincide all show
# Colours that nothing else has, which become the page's.
_TEXT, _LINE = "#010203", "#010204"
_SERIES = [f"#0102{10 + number}" for number in range(_NUM_SERIES)]
_THEMED = {_TEXT: "currentColor", _LINE: "var(--line)"} | {colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}


def curves(lines: Mapping[str, Points], *, x: str, log_x: bool = False, log_y: bool = False, dots: Sequence[str] = ()) -> Markup:
    """Lines of (x, y) by name, long ones thinned to means of neighbours; those of `dots` as marks alone."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(x)
        for number, (name, points) in enumerate(lines.items()):
            style: dict[str, Any] = {"color": _SERIES[number % _NUM_SERIES], "linewidth": 1.5, "markersize": 5}
            if name in dots or len(points) == 1:
                style |= {"linestyle": "none", "marker": _MARKERS[number % len(_MARKERS)], "markerfacecolor": "none"}
            axes.plot(*zip(*(points if name in dots else thinned(points))), label=name, **style)
        for axis, is_log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
            if is_log:
                axis.axes.set(**{f"{axis.axis_name}scale": "log"})
                low, high = axis.get_data_interval()
                axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 3, 5, 7), numticks=8))
                axis.set_minor_locator(NullLocator())
            else:
                axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if len(lines) > 1:
            # Under the drawing, where it covers no line, however long the names are.
            columns = max(1, 44 // (max(map(len, lines)) + 6))
            figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
            figure.set_figheight(_SIZE[1] + 0.18 * math.ceil(len(lines) / columns))
        return _svg(figure, salt=f"{x}{lines}")


def heat_map(rows: Sequence[Sequence[float] | None], *, x: str, y: str) -> Markup:
    """A cell for each figure of `rows`, the first at the top; a row that is None stays empty."""
    width = max(len(row) for row in rows if row)
    cells = [list(row) if row else [math.nan] * width for row in rows]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(x, y)
        axes.grid(visible=False)
        image = axes.pcolormesh(cells, cmap="viridis", rasterized=False)
        axes.set(xlim=(0, width), ylim=(len(cells), 0))
        for axis, count in ((axes.xaxis, width), (axes.yaxis, len(cells))):
            ticks = range(0, count, max(1, count // 6))
            axis.set_ticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
        bar = figure.colorbar(image, ax=axes, format=FuncFormatter(lambda value, _: short(value)))
        bar.outline.set_visible(False)
        return _svg(figure, salt=f"{x}{y}{cells}")


def thinned(points: Points) -> Points:
    """At most so many points as can be told apart: means of runs of neighbours."""
    size = math.ceil(len(points) / _MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def short(value: float) -> str:
    """Four digits at most: 12.5K, 3M, 0.0123, 1e-05."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _axes(x: str, y: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set(xlabel=x, ylabel=y, axisbelow=True)
    return figure, axes


def _svg(figure: Figure, *, salt: str) -> Markup:
    """The drawing alone, without the head of a file; `salt` keeps its ids apart from those of others on the page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawing = text.getvalue()
    # All drawings name their groups alike, and nothing refers to them.
    themed = re.sub(r'<g id="[^"]*"', "<g", drawing[drawing.index("<svg") :])
    for colour, of_page in _THEMED.items():
        themed = themed.replace(colour, of_page)
    return Markup(themed)
