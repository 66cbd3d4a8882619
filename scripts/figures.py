"""Figures: perplexity by position, training losses, times and speeds over lengths. No display is needed; colours suit colour-blind eyes."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

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
        axes.plot(*zip(*points), label=name, marker=_marker(number), markersize=4.5, linestyle=dash, **_style(number))
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
    _save(figure, path)


def plot_losses(path: Path, runs: Mapping[str, Path]) -> None:
    """Writes a PNG of training loss over tokens, from each named run's metrics.jsonl, with held-out evaluations as markers.

    Losses are running means over as many steps for all runs, a fiftieth of the longest; skipped steps without a loss are left out.
    """
    histories = {name: _read_history(file) for name, file in runs.items()}
    window = max(1, max(len(training) for training, _ in histories.values()) // 50)
    figure, axes = _new_figure()
    for number, (name, (training, heldout)) in enumerate(histories.items()):
        axes.plot(*zip(*_running_mean(training, window)), label=name, **_style(number))
        if heldout:
            label = f"{name}, held out"
            axes.plot(*zip(*heldout), label=label, marker=_marker(number), markerfacecolor="white", linestyle="none", **_style(number))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)" + (f", mean of {window} steps" if window > 1 else ""))
    axes.legend(frameon=False)
    _save(figure, path)


def plot_over_lengths(path: Path, title: str, panels: Mapping[str, Sequence[tuple[str, str, Sequence[tuple[int, float]]]]]) -> None:
    """Writes a PNG of figures over lengths, a panel for each entry, what is measured and its unit: its lines are
    (kernel or program, attention, [(tokens, figure), ...]).

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
            style = {"marker": _marker(number), "linestyle": _DASHES[number % len(_DASHES)], **_style(attentions.index(attention))}
            handles[f"{kernel}, {attention}"], *_ = axes.plot(*zip(*points), markersize=4.5, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))
        axes.xaxis.set_minor_locator(NullLocator())
        _log_ticks(axes, subs=(1, 2, 5))
        axes.set_xlabel("tokens")
        axes.set_ylabel(name)
        _plain(axes)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


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
        _plain(axes)
    _save(figure, path)


def short_count(value: int) -> str:
    """512, 1K, 2K, 1M: powers of two as people write context lengths."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, steps and events; what is no JSON object is left out, such as a line that a kill cut short."""
    lines = []
    for line in file.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            lines.append(values)
    return lines


def _read_history(file: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(tokens, loss) of the training steps and of the held-out evaluations."""
    training, heldout = {}, {}
    tokens = {0: 0}
    for values in read_metrics(file):
        step = values["step"]
        if "event" not in values:
            tokens[step] = values["tokens"]
            training[step] = values["loss"]
        elif values["event"] == "evaluation":
            heldout[step] = values["heldout_loss"]
    return tuple([(tokens[step], loss) for step, loss in found.items() if loss is not None] for found in (training, heldout))  # type: ignore[return-value]


def _running_mean(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    losses = [loss for _, loss in points]
    means = [sum(part) / len(part) for part in (losses[max(0, end - window) : end] for end in range(1, len(losses) + 1))]
    return [(tokens, mean) for (tokens, _), mean in zip(points, means)]


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "linewidth": 1.6}


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _log_ticks(axes: Axes, subs: Sequence[int] = (1, 2, 3, 4, 5, 7)) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    """Beside, then renamed: a reader sees the old figure or the new one."""
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    beside.replace(path)
