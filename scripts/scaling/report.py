"""A study of scaling laws as Markdown and as a figure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from configs.schema import Compute
from scripts.figures import marker, plain, save, style
from scripts.scaling.laws import CONFIDENCE, Interval, Law
from scripts.scaling.published import published
from scripts.scaling.study import ALL, Row, Study, compute_of, without_partner
from scripts.sweeps.results import position
from train.plan_report import short
from train.report import table


def markdown(study: Study) -> str:
    """fit.md."""
    config = study.config
    law = "L = e + a·C^b" if config.offset else "L = a·C^b"
    compute = "6ND" if config.compute is Compute.SIX_ND else "FLOPs executed, attention and head included"
    rows = [row for part in study.rows.values() for row in part]
    parts = [
        f"# Scaling laws of {config.results}",
        f"{law}, L in nats a token on held-out rows of {study.context:,} tokens, C in PFLOP/s-days ({compute}). Huber's loss on log L "
        f"from {config.huber:g} on; intervals are of {CONFIDENCE:.0%}: standard errors of {config.resamples:,} bootstrap fits, times "
        f"Student's t. {len(rows)} runs on {_all(rows, 'device')}; commits {_all(rows, 'git')}.",
        *(f"Missing: {lacking}." for lacking in without_partner(study.rows)),
        "![Scaling laws](fit.png)",
        "## Laws",
        _laws(study),
        "## The largest size, foretold from the smaller ones",
        _predictions(study),
        *(["## The gap", _gaps(study)] if len(study.arms) > 1 else []),
        *(["## By position", _positions(study)] if len(study.columns) > 1 else []),
        "## Runs",
        _runs(study),
    ]
    return "\n\n".join(parts) + "\n"


def _all(rows: Sequence[Row], name: str) -> str:
    return ", ".join(sorted({row[name] for row in rows} - {""})) or "unknown"


def _laws(study: Study) -> str:
    header = ["arm", "runs", "a", "b", *(["e"] if study.config.offset else []), "rms residual", "the paper's law"]
    rows = []
    for arm in study.arms:
        fit = study.fits[arm, ALL]
        offset = [_with(fit.parameter("e"))] if study.config.offset else []
        residual = f"{np.sqrt((fit.residuals**2).mean()):.2%}"
        rows.append(
            [arm, str(len(fit.loss)), _with(fit.parameter("a")), _with(fit.parameter("b")), *offset, residual, _paper(study, arm, ALL)]
        )
    return table(header, rows)


def _paper(study: Study, arm: str, column: str) -> str:
    law = paper_law(study, arm, column)
    return f"{law.a:.3f} C^{law.b:.3f}" if law else "none"


def paper_law(study: Study, arm: str, column: str) -> Law | None:
    """The line that the paper prints for the same thing, where it counts compute as this study does and has no offset either."""
    if study.config.compute is not Compute.SIX_ND or study.config.offset:
        return None
    return published(arm, context=study.context, low=None if column == ALL else position(column), bucket=study.bucket)


def _predictions(study: Study) -> str:
    if not study.predictions:
        return "The smaller sizes are too few for a law of their own."
    rows = [
        [
            arm,
            short(found.non_embedding),
            _with(found.foretold, digits=4),
            f"{found.found:.4f}",
            f"{found.miss:+.4f}",
            f"{found.miss / found.foretold.value:+.2%}",
            "yes" if found.found in found.foretold else "no",
        ]
        for arm, found in study.predictions.items()
    ]
    return table(["arm", "parameters", "foretold", "found", "miss (nats)", "miss", "inside the interval"], rows)


def _gaps(study: Study) -> str:
    reference = study.arms[0]
    rows = [[f"{reference} − {gap.arm}", short(size), f"{value:+.4f}", ""] for gap in study.gaps[ALL] for size, value in gap.pairs]
    for gap in study.gaps[ALL]:
        rows.append([f"{reference} − {gap.arm}", "mean of the pairs", f"{gap.mean.value:+.4f}", _range(gap.mean, digits=4)])
        rows.append(
            [f"{reference} − {gap.arm}", "between the laws, largest", f"{gap.at_largest.value:+.4f}", _range(gap.at_largest, digits=4)]
        )
    note = "Nats a token, pairs of the same size, tokens and seed; negative where the first is better."
    if paper_law(study, reference, ALL):
        note += " The paper, at 8K: within 0.001."
    return f"{table(['gap', 'parameters', 'nats', 'interval'], rows, texts=2)}\n\n{note}"


def _positions(study: Study) -> str:
    others = study.arms[1:]
    header = [
        "positions",
        *(f"{arm}: {name}" for arm in study.arms for name in ("a", "b", "the paper's")),
        *(f"gap to {arm}" for arm in others),
    ]
    rows = []
    for column in study.columns[1:]:
        low = position(column)
        cells = [cell for arm in study.arms for cell in (*_line(study, arm, column), _paper(study, arm, column))]
        gaps = [f"{gap.mean.value:+.4f} ({_range(gap.mean, digits=4)})" for gap in study.gaps[column]]
        rows.append([f"{low:,} to {low + study.bucket - 1:,}", *cells, *gaps])
    return table(header, rows) + "\n\nGaps are means over the pairs of all sizes."


def _line(study: Study, arm: str, column: str) -> tuple[str, str]:
    fit = study.fits[arm, column]
    return _with(fit.parameter("a")), _with(fit.parameter("b"))


def _runs(study: Study) -> str:
    header = ["arm", "job", "parameters", "tokens", "epochs", "seed", "C", "loss", "residual", "last positions"]
    rows = []
    for arm, part in study.rows.items():
        for row, residual in zip(part, study.fits[arm, ALL].residuals, strict=True):
            counts = [short(int(row["non_embedding"])), short(int(row["tokens"])), row["epochs"], row["seed"]]
            trailing = f"{float(row['trailing_loss']):.4f}" if row["trailing_loss"] else ""
            losses = [f"{compute_of(study.config, row):.3g}", f"{float(row[ALL]):.4f}", f"{residual:+.2%}", trailing]
            rows.append([arm, row["job"], *counts, *losses])
    return table(header, rows, texts=2)


def _with(found: Interval, digits: int = 3) -> str:
    return f"{found.value:.{digits}f} ({_range(found, digits)})"


def _range(found: Interval, digits: int = 3) -> str:
    return f"{found.low:.{digits}f} to {found.high:.{digits}f}" if np.isfinite(found.low) else "no interval"


def plot(study: Study, path: Path) -> None:
    """fit.png: losses and laws, residuals, gaps, exponents by position."""
    panels = [_plot_laws, _plot_residuals]
    panels += [_plot_gaps] if len(study.arms) > 1 else []
    panels += [_plot_exponents] if len(study.columns) > 2 else []
    figure = Figure(figsize=(10.4, 3.9 * -(-len(panels) // 2)), dpi=150, layout="constrained")
    places = list(figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat)
    for axes, panel in zip(places, panels):
        panel(study, axes)
        plain(axes)
    for axes in places[len(panels) :]:
        axes.remove()
    save(figure, path)


def _plot_laws(study: Study, axes: Axes) -> None:
    unit = "6ND" if study.config.compute is Compute.SIX_ND else "executed"
    for number, arm in enumerate(study.arms):
        fit, look = study.fits[arm, ALL], style(number)
        span = np.geomspace(fit.compute.min(), fit.compute.max(), 50)
        axes.plot(span, fit.law(span), label=f"{arm}: C^{fit.law.b:.3f}", **look)
        axes.plot(fit.compute, fit.loss, marker=marker(number), linestyle="none", markersize=5, color=look["color"])
        if law := paper_law(study, arm, ALL):
            axes.plot(
                span, law(span), linestyle=(0, (1, 1.5)), color=look["color"], linewidth=1.2, label=f"the paper's, {arm}: C^{law.b:.3f}"
            )
        if arm in study.predictions:
            foretold = study.predictions[arm].foretold
            reach = [[max(0.0, foretold.value - foretold.low)], [max(0.0, foretold.high - foretold.value)]]
            at = [fit.compute.max() * 1.06**number]
            axes.errorbar(at, [foretold.value], reach, marker="_", capsize=3, color=look["color"], linewidth=1, label=f"foretold, {arm}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"C (PFLOP/s-days, {unit})")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False, fontsize=7)


def _plot_residuals(study: Study, axes: Axes) -> None:
    for number, arm in enumerate(study.arms):
        fit = study.fits[arm, ALL]
        axes.plot(fit.compute, 100 * fit.residuals, marker=marker(number), linestyle="none", color=style(number)["color"], label=arm)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("C (PFLOP/s-days)")
    axes.set_ylabel("loss over its law (%)")
    axes.legend(frameon=False, fontsize=7)


def _plot_gaps(study: Study, axes: Axes) -> None:
    for number, gap in enumerate(study.gaps[ALL]):
        look = style(number + 1)
        label = f"{study.arms[0]} − {gap.arm}, mean {gap.mean.value:+.4f}"
        axes.plot(*zip(*gap.pairs), marker=marker(number + 1), linestyle="none", color=look["color"], label=label)
        if np.isfinite(gap.mean.low):
            axes.axhspan(gap.mean.low, gap.mean.high, color=look["color"], alpha=0.12, linewidth=0)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({size for gap in study.gaps[ALL] for size, _ in gap.pairs})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters without embeddings")
    axes.set_ylabel("gap (nats per token)")
    axes.legend(frameon=False, fontsize=7)


def _plot_exponents(study: Study, axes: Axes) -> None:
    columns: Sequence[str] = study.columns[1:]
    for number, arm in enumerate(study.arms):
        look, shift = style(number), (number - (len(study.arms) - 1) / 2) * 0.12
        found = [study.fits[arm, column].parameter("b") for column in columns]
        places = [index + shift for index in range(len(columns))]
        reach = [[b.value - b.low for b in found], [b.high - b.value for b in found]]
        finite = reach if np.isfinite(reach).all() else None
        axes.errorbar(
            places, [b.value for b in found], finite, marker=marker(number), linestyle="none", capsize=2, color=look["color"], label=arm
        )
        lines = [(place, law.b) for place, column in zip(places, columns) if (law := paper_law(study, arm, column))]
        if lines:
            axes.plot(*zip(*lines), linestyle=(0, (1, 1.5)), color=look["color"], linewidth=1.2, label=f"the paper's, {arm}")
    axes.set_xticks(
        range(len(columns)), [f"{position(column):,}" for column in columns], rotation=60 if len(columns) > 6 else 0, fontsize=7
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"positions, from this one on {study.bucket:,} tokens")
    axes.set_ylabel("exponent b")
    axes.legend(frameon=False, fontsize=7)
