"""A page on the runs of a sweep, or of any folder that holds runs' folders."""

from collections import defaultdict
from pathlib import Path

from configs.schema import ConfigError
from scripts.reporting.charts import Points, curves, short
from scripts.reporting.left import left_sections
from scripts.reporting.page import Figure, Page, Section, Table
from scripts.reporting.runs import is_run, loss_points, read_lines, steps_of
from scripts.sweeps.results import FILE, POSITION, position, read

# Columns that are shown, those of words first, and how.
_WORDS = ("job", "arm", "model", "device")
_NUMBERS = ("non_embedding", "tokens", "epochs", "seed", "context", "lr", "flops_6nd", "flops_executed")
_LOSSES = ("train_loss", "heldout_loss", "trailing_loss")
_SPEEDS = ("tokens_per_second", "seconds")
_MOST_LINES = 7  # of a figure, for its colours

Row = dict[str, str]


def is_sweep(folder: Path) -> bool:
    """Whether there are a sweep's results, or runs."""
    return (folder / FILE).is_file() or bool(_runs(folder))


def sweep_page(folder: Path) -> Page:
    """All there is to say of a sweep. Raises ConfigError where its results are damaged, or there is nothing to show."""
    rows, runs, errors = read(folder / FILE), _runs(folder), sorted(folder.glob("*.error"))
    if not (rows or runs or errors):
        raise ConfigError(f"folder={folder}: {FILE} holds no finished job, and there are no runs")
    training, notes = _losses(runs)
    facts = [("jobs done" if rows else "runs", str(len(rows) or len(runs))), ("jobs failed", str(len(errors)))]
    if rows:
        facts += [("tokens", short(sum(float(row["tokens"]) for row in rows))), ("hours", f"{_hours(rows):.2f}")]
        facts.append(("lowest held-out loss", f"{min(float(row['heldout_loss']) for row in rows):.4f}"))
    failed = [[path.stem, path.read_text(errors="replace").strip()] for path in errors]
    return Page(
        title=folder.name,
        subtitle=str(folder),
        facts=facts,
        sections=[
            Section(title="Held-out loss", figures=_compute(rows) + _positions(rows)),
            Section(title="Results", tables=_table(rows)),
            Section(title="Failed jobs", tables=[Table(header=["job", "why"], rows=failed, texts=2)] if failed else []),
            Section(title="Training", figures=training),
            *left_sections(folder),
        ],
        notes=notes,
    )


def _runs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))


def _hours(rows: list[Row]) -> float:
    return sum(float(row["seconds"]) for row in rows) / 3600


def _compute(rows: list[Row]) -> list[Figure]:
    """Losses over compute, counted both ways, an arm a colour."""
    figures = []
    for column, name in (("flops_6nd", "6ND FLOPs"), ("flops_executed", "executed FLOPs, head and attention included")):
        arms: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            arms[row["arm"]].append((float(row[column]), float(row["heldout_loss"])))
        if arms:
            drawing = curves({arm: sorted(points) for arm, points in arms.items()}, x=name, log_x=True, log_y=True, dots=list(arms))
            figures.append(Figure(caption=f"held-out loss over {name}", content=drawing))
    return figures


def _positions(rows: list[Row]) -> list[Figure]:
    """Of each arm the job with most compute, its held-out loss by position."""
    largest: dict[str, Row] = {}
    for row in rows:
        if float(row["flops_6nd"]) >= float(largest.get(row["arm"], {"flops_6nd": "0"})["flops_6nd"]):
            largest[row["arm"]] = row
    lines: dict[str, Points] = {
        arm: [(position(key), float(value)) for key, value in row.items() if key.startswith(POSITION) and value]
        for arm, row in largest.items()
    }
    shown = {arm: points for arm, points in lines.items() if len(points) > 1}
    caption = "loss from each position on, of the largest job of each arm"
    return [Figure(caption=caption, content=curves(shown, x="position in the row"))] if shown else []


def _table(rows: list[Row]) -> list[Table]:
    shown = [column for column in (*_WORDS, *_LOSSES, *_NUMBERS, *_SPEEDS) if any(row.get(column) for row in rows)]
    cells = [[_cell(column, row.get(column) or "") for column in shown] for row in rows]
    words = sum(column in _WORDS for column in shown)
    return [Table(header=[column.replace("_", " ") for column in shown], rows=cells, texts=words)] if rows else []


def _cell(column: str, value: str) -> str:
    if not value or column in _WORDS:
        return value
    return f"{float(value):.4f}" if column in _LOSSES else short(float(value))


def _losses(runs: list[Path]) -> tuple[list[Figure], list[str]]:
    """Training losses of all runs, some in each figure, and notes on what their files lack."""
    found = {folder.name: read_lines(folder) for folder in runs}
    drawn = [(name, points) for name, (lines, _) in found.items() if (points := loss_points(steps_of(lines)))]
    parts = [drawn[start : start + _MOST_LINES] for start in range(0, len(drawn), _MOST_LINES)]
    figures = [Figure(caption="training loss (nats a token)", content=curves(dict(part), x="training tokens")) for part in parts]
    return figures, [note for _, notes in found.values() for note in notes]
