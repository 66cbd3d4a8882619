"""Figures of evaluations, training runs, corpora and benchmarks. No display is needed; colours suit colour-blind readers."""

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's palette, darkest first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)))  # lines that coincide, as full attention and MoBA do at first, both show
# Positions before this are a document's opening lines: few tokens, and far above everything else.
_FIRST_POSITION = 16


def plot_positions(path: Path, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes a PNG of perplexity over the position in the document.

    `series` gives each line's name and its buckets as in `by_position` of evaluation.json: low, high (tokens) and perplexity.
    """
    figure, axes = _new_figure()
    shown = {name: [b for b in buckets if b["low"] >= _FIRST_POSITION] or buckets for name, buckets in series.items()}
    for number, (name, buckets) in enumerate(shown.items()):
        points = [(math.sqrt(b["low"] * b["high"]), b["perplexity"]) for b in buckets if b["perplexity"] is not None]
        dash = _DASHES[number % len(_DASHES)]
        axes.plot(*zip(*points), label=name, marker=marker(number), markersize=4.5, linestyle=dash, **style(number))
    edges = sorted({edge for buckets in shown.values() for b in buckets for edge in (b["low"], b["high"])})
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(FixedLocator(edges))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())
    _log_ticks(axes)
    axes.set_xlabel("position in the document (tokens; each point is the bucket between two ticks)")
    axes.set_ylabel("perplexity per token")
    axes.legend(frameon=False)
    save(figure, path)


def plot_losses(path: Path, runs: Mapping[str, Path]) -> None:
    """Writes a PNG of training loss over tokens, from each named run's metrics.jsonl, with held-out evaluations as markers and a dotted
    line at each switch that changed the loss.

    Losses are running means over as many steps for all runs, a fiftieth of the longest; skipped steps without a loss are left out. What
    comes before a twentieth of the tokens may lie above the figure, which would be flat otherwise.
    """
    histories = {name: _read_history(file) for name, file in runs.items()}
    window = max(1, max(len(training) for training, *_ in histories.values()) // 50)
    figure, axes = _new_figure()
    drawn = []
    for number, (name, (training, heldout, switches)) in enumerate(histories.items()):
        line = _running_mean(training, window)
        axes.plot(*zip(*line), label=name, **style(number))
        drawn += [*line, *heldout]
        if heldout:
            label = f"{name}, held out"
            axes.plot(*zip(*heldout), label=label, marker=marker(number), markerfacecolor="white", linestyle="none", **style(number))
        for tokens in switches:
            axes.axvline(tokens, linestyle=":", **style(number))
    last = max(tokens for tokens, _ in drawn)
    axes.set_xlim(left=0)
    low, high = min(loss for _, loss in drawn), max(loss for tokens, loss in drawn if tokens >= last / 20)
    axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)" + (f", mean of {window} steps" if window > 1 else ""))
    axes.legend(frameon=False)
    save(figure, path)


def plot_over_lengths(
    path: Path,
    title: str,
    panels: Mapping[str, Sequence[tuple[str, str, Sequence[tuple[int, float]]]]],
    *,
    from_zero: Collection[str] = (),
) -> None:
    """Writes a PNG of figures over lengths, a panel for each entry, what is measured and its unit: its lines are
    (kernel or program, attention, [(tokens, figure), ...]). Scales are logarithmic but for panels `from_zero`.

    A colour stands for an attention, a marker and dash for a kernel, so that rivals at one task share a colour.
    """
    lines = [line for panel in panels.values() for line in panel]
    kernels, attentions = (list(dict.fromkeys(line[part] for line in lines)) for part in (0, 1))
    lengths = sorted({tokens for *_, points in lines for tokens, _ in points})
    figure = Figure(figsize=(3.0 + 3.8 * max(1, len(panels)), 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    handles = {}
    for axes, (name, panel) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels.items()):
        for kernel, attention, points in panel:
            number = kernels.index(kernel)
            look = {"marker": marker(number), "linestyle": _DASHES[number % len(_DASHES)], **style(attentions.index(attention))}
            handles[f"{kernel}, {attention}"], *_ = axes.plot(*zip(*points), markersize=4.5, **look)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))
        axes.xaxis.set_minor_locator(NullLocator())
        if name in from_zero:
            axes.set_ylim(0, 1.08 * max(figure for *_, points in panel for _, figure in points) or 1)
        else:
            _log_ticks(axes, subs=(1, 2, 5))
        axes.set_xlabel("tokens")
        axes.set_ylabel(name)
        plain(axes)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, path)


def plot_lengths(path: Path, title: str, panels: Mapping[str, Sequence[tuple[int, int, int]]]) -> None:
    """Writes a PNG of document lengths: for each named split, (from, documents, tokens) of every length in [from, 2 from) tokens.

    Bars are shares of the split's documents and, beside them, of its tokens: long documents are few and hold much.
    """
    figure = Figure(figsize=(3.0 + 3.8 * len(panels), 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (name, bins) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        places = [math.log2(low) for low, *_ in bins]
        for number, (label, column) in enumerate((("documents", 1), ("tokens", 2))):
            total = sum(entry[column] for entry in bins)
            shares = [100 * entry[column] / total for entry in bins]
            axes.bar([place + (0.3 if number == 0 else 0.7) for place in places], shares, width=0.4, label=label, color=_COLOURS[number])
        axes.xaxis.set_major_locator(FixedLocator(sorted({*places, *(place + 1 for place in places)})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(2**value))))
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
        axes.set_xlim(places[0], places[-1] + 1)
        axes.set_xlabel(f"tokens of a document ({name})")
        axes.set_ylabel("share (%)")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above: a bar may be anywhere
        plain(axes)
    save(figure, path)


def plot_needles(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG of needles by depth and context length, a line of heat maps for each attention, from needle rows of a report."""
    contexts, depths = (sorted({row[key] for row in rows}) for key in ("context", "depth"))
    names = {"written": "written answer is right", "ranked_first": "right answer ranked first"}
    maps: dict[str, dict[str, list[list[float]]]] = {}
    for setting in dict.fromkeys(row["attention"] for row in rows):
        found = {(row["context"], row["depth"]): row for row in rows if row["attention"] == setting}
        shown = [key for key in names if rows[0][key] is not None]
        maps[setting] = {names[key]: [[found[context, depth][key] for context in contexts] for depth in depths] for key in shown}
    _plot_heat_maps(
        path, maps, x=("context (tokens)", [short_count(context) for context in contexts]), y=("depth", [f"{d:g}" for d in depths])
    )


def plot_gates(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG of the gate's statistics by layer and head, a line of heat maps for each attention, from gate rows of a report."""
    nothing = [math.nan] * max(len(heads) for row in rows for layers in row["heads"].values() for heads in layers if heads)
    maps = {
        f"{row['attention']}, {short_count(row['context'])}": {
            name.replace("_", " "): [heads or nothing for heads in layers] for name, layers in row["heads"].items()
        }
        for row in rows
    }
    layers = max(len(values) for panels in maps.values() for values in panels.values())
    _plot_heat_maps(path, maps, x=("head", list(map(str, range(len(nothing))))), y=("layer", list(map(str, range(layers)))))


# Shares of a heat map's figure are coloured from 0 to 1, what may be beyond by its own range.
_BEYOND_ONE = {"margin", "snr"}
_MOST_WRITTEN = 120  # cells of a heat map that have their value written in them
_ABREAST = 4  # heat maps in a line of a figure


def _plot_heat_maps(
    path: Path, maps: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], *, x: tuple[str, list[str]], y: tuple[str, list[str]]
) -> None:
    """`maps`: for each name, and each title under it, values [y][x]; `x` and `y` are names of the axes and of their ticks."""
    columns = min(_ABREAST, max(map(len, maps.values())))
    lines = [
        (name, list(panels.items())[first : first + columns]) for name, panels in maps.items() for first in range(0, len(panels), columns)
    ]
    width, height = 1.0 + max(2.2, 0.42 * len(x[1])), 1.0 + max(1.3, 0.3 * len(y[1]))
    figure = Figure(figsize=(columns * width, len(lines) * height), dpi=120, layout="constrained")
    for row, (name, panels) in zip(figure.subplots(len(lines), columns, squeeze=False), lines):
        for axes, (title, values) in zip(row, panels):
            _plot_heat_map(axes, values, x, y, top=None if title in _BEYOND_ONE else 1.0)
            axes.set_title(f"{name}\n{title}", fontsize=8, loc="left")
        for axes in row[len(panels) :]:
            axes.remove()
    save(figure, path)


def _plot_heat_map(
    axes: Axes, values: Sequence[Sequence[float]], x: tuple[str, list[str]], y: tuple[str, list[str]], *, top: float | None
) -> None:
    """Coloured from 0 to `top`; None takes the values' own range."""
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=None if top is None else 0.0, vmax=top)
    middle = sum(image.get_clim()) / 2
    for (row, line), column in itertools.product(enumerate(values), range(len(x[1]))):
        if len(x[1]) * len(y[1]) <= _MOST_WRITTEN and not math.isnan(line[column]):
            colour = "black" if line[column] > middle else "white"
            axes.text(column, row, f"{line[column]:.2g}", ha="center", va="center", fontsize=6, color=colour)
    for axis, (label, ticks) in ((axes.xaxis, x), (axes.yaxis, y)):
        every = math.ceil(len(ticks) / 16)
        axis.set_major_locator(FixedLocator(list(range(0, len(ticks), every))))
        axis.set_major_formatter(FixedFormatter(ticks[::every]))
        axis.set_label_text(label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.figure.colorbar(image, ax=axes, shrink=0.9).ax.tick_params(labelsize=6)


def short_count(value: int) -> str:
    """512, 1K, 2K, 1M: powers of two as people write context lengths."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, steps and events; what is no JSON object is left out, such as a line that a kill cut short."""
    lines = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            lines.append(values)
    return lines


def _read_history(file: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]], list[int]]:
    """(tokens, loss) of the training steps and of the held-out evaluations; the tokens of each switch that changed the loss."""
    training, heldout, switches = {}, {}, []
    tokens = {0: 0}
    for values in read_metrics(file):
        step, event = values["step"], values.get("event")
        if event is None:
            tokens[step] = values["tokens"]
            training[step] = values["loss"]
        elif event == "evaluation":
            heldout[step] = values["heldout_loss"]
        elif event == "switch" and values.get("loss_before") != values.get("loss_after"):
            switches.append(tokens[step])
    points = [[(tokens[step], loss) for step, loss in found.items() if loss is not None] for found in (training, heldout)]
    return points[0], points[1], switches


def _running_mean(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    losses = [loss for _, loss in points]
    means = [sum(part) / len(part) for part in (losses[max(0, end - window) : end] for end in range(1, len(losses) + 1))]
    return [(tokens, mean) for (tokens, _), mean in zip(points, means)]


def style(number: int) -> dict[str, Any]:
    """Colour and width of the line of this number."""
    return {"color": _COLOURS[number % len(_COLOURS)], "linewidth": 1.6}


def marker(number: int) -> str:
    """Of the points of this number."""
    return _MARKERS[number % len(_MARKERS)]


def _log_ticks(axes: Axes, subs: Sequence[int] = (1, 2, 3, 4, 5, 7)) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Takes away what frames a panel, and draws a grid behind it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Beside, then renamed: a reader sees the old figure or the new one."""
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    beside.replace(path)
