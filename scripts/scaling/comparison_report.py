"""A comparison of arms as Markdown and as a figure."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from scripts.figures import marker, plain, save, style
from scripts.scaling.comparison import Comparison, Group, PairedGap
from scripts.scaling.laws import CONFIDENCE, Interval
from train.report import table


def markdown(found: Comparison) -> str:
    """compare.md."""
    parts = [
        f"# Arms of {found.config.results}",
        "Nats a token on held-out rows. A gap is the first arm's loss minus the other's, negative where the first is better. Its interval "
        f"is of {CONFIDENCE:.0%}, from {found.config.resamples:,} draws of held-out documents with all their rows, the same ones for both; "
        "of rows, where runs have not kept whose they are: then it is too narrow, as rows of one document resemble each other. Which, and "
        "how many there are, stands beside it: of a handful it is still too narrow, of one there is none. It is of the text alone: what "
        "another seed would change is in the spread over seeds, where there are several.",
        "![Arms](compare.png)",
        *(f"Missing: {lacking}." for lacking in found.missing),
    ]
    for group in found.groups:
        parts += [f"## {_title(group)}", _losses(group), *([_positions(group)] if _has_ranges(group) else [])]
    return "\n\n".join(parts) + "\n"


def _title(group: Group) -> str:
    setting = group.setting
    numbers = f"{int(setting['context']):,} tokens of context, {int(setting['tokens']):,} tokens, lr {setting['lr']}"
    return f"{setting['model'] or 'one model'}, {numbers}"


def _has_ranges(group: Group) -> bool:
    return any(len(gap.by_position) > 1 for gap in group.gaps)


def _losses(group: Group) -> str:
    gaps = {gap.arm: gap for gap in group.gaps}
    rows = []
    for arm, loss in group.losses.items():
        cells = [f"{loss:.4f}", *(_gap(gaps[arm]) if arm in gaps else ["", "", "", ""])]
        rows.append([arm, *cells])
    interval = f"interval over {_drawn(group)}" if group.num_drawn else "interval"
    return table(["arm", "loss", f"{group.reference} − arm", interval, "seeds", "sd over seeds"], rows)


def _drawn(group: Group) -> str:
    return f"{group.num_drawn} held-out {group.drawn}"


def _gap(gap: PairedGap) -> list[str]:
    spread = f"{np.std(gap.by_seed, ddof=1):.4f}" if len(gap.by_seed) > 1 else ""
    return [f"{gap.whole.value:+.4f}", _range(gap.whole), str(len(gap.seeds)), spread]


def _range(found: Interval) -> str:
    return f"{found.low:+.4f} to {found.high:+.4f}" if np.isfinite(found.low) else "none"


def _positions(group: Group) -> str:
    gaps = [gap for gap in group.gaps if gap.by_position]
    lows = sorted({low for gap in gaps for low in gap.by_position})
    rows = [
        [
            f"{low:,} to {low + group.bucket - 1:,}",
            str(group.drawn_by_position[low]),
            *(f"{gap.by_position[low].value:+.4f} ({_range(gap.by_position[low])})" for gap in gaps),
        ]
        for low in lows
    ]
    return table(["positions", group.drawn, *(f"{group.reference} − {gap.arm}" for gap in gaps)], rows)


def plot(found: Comparison, path: Path) -> None:
    """compare.png: for each setting the loss of each arm, with its gap's interval, and gaps by position."""
    columns = 1 + any(map(_has_ranges, found.groups))
    figure = Figure(figsize=(5.2 * columns, 3.9 * len(found.groups)), dpi=150, layout="constrained")
    for line, group in zip(figure.subplots(len(found.groups), columns, squeeze=False), found.groups, strict=True):
        _plot_losses(group, line[0])
        plain(line[0])
        if columns == 2:
            _plot_positions(group, line[1])
            plain(line[1])
    save(figure, path)


def _plot_losses(group: Group, axes: Axes) -> None:
    gaps = {gap.arm: gap.whole for gap in group.gaps}
    for number, (arm, loss) in enumerate(group.losses.items()):
        gap = gaps.get(arm)
        # A lower gap is a higher loss.
        reach = [[gap.high - gap.value], [gap.value - gap.low]] if gap and np.isfinite(gap.low) else None
        axes.errorbar([number], [loss], reach, marker=marker(number), capsize=4, linestyle="none", color=style(number)["color"])
    axes.set_xticks(range(len(group.losses)), list(group.losses), rotation=20 if len(group.losses) > 2 else 0, fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.5, len(group.losses) - 0.5)
    axes.set_ylabel("held-out loss (nats per token)")
    bars = f"\nbars: interval of the gap to {group.reference} over {_drawn(group)}" if group.num_drawn else ""
    axes.set_title(f"{_title(group)}{bars}", fontsize=7)


def _plot_positions(group: Group, axes: Axes) -> None:
    for number, gap in enumerate(group.gaps, start=1):
        if gap.by_position:
            places = [low + group.bucket / 2 for low in gap.by_position]
            found, look = list(gap.by_position.values()), style(number)
            axes.plot(places, [each.value for each in found], marker=marker(number), markersize=4, label=gap.arm, **look)
            axes.fill_between(
                places, [each.low for each in found], [each.high for each in found], color=look["color"], alpha=0.12, linewidth=0
            )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel(f"position ({group.bucket:,} tokens a point)")
    axes.set_ylabel(f"{group.reference} − arm (nats per token)")
    axes.legend(frameon=False, fontsize=7)
