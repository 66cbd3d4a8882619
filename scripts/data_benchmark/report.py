"""Figures of the data benchmark: one line each, as Markdown and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One figure: what was measured, its value and unit, what it should reach (in words, may be empty), and what to know of it."""

    name: str
    value: float
    unit: str
    target: str = ""
    note: str = ""


def markdown(figures: Sequence[Measured], facts: Mapping[str, str]) -> str:
    """A table of the figures under a line that says where they are from."""
    lines = [", ".join(f"{key} {value}" for key, value in facts.items()), "", "| what | figure | target | |", "|---|---:|---|---|"]
    lines += [f"| {item.name} | {_short(item.value)} {item.unit} | {item.target} | {item.note} |" for item in figures]
    return "\n".join(lines)


def to_csv(figures: Sequence[Measured], facts: Mapping[str, str]) -> str:
    """One line a figure, the facts repeated in each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "value", "unit", "target", "note", *facts])
    writer.writerows([item.name, repr(item.value), item.unit, item.target, item.note, *facts.values()] for item in figures)
    return out.getvalue()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
