"""results.csv of a sweep: a row for each finished job, with all that a fit needs, portable between machines."""

import csv
import fcntl
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.layers import LayerAttention
from configs.schema import ConfigError, RunConfig
from model.accounting import parameter_counts
from scripts.figures import read_metrics
from scripts.sweeps.jobs import Job
from train.evaluate import attention_label
from train.metrics import FILE as METRICS
from train.run_dir import HELDOUT, git_state, write_atomically

FILE = "results.csv"
COLUMNS = (
    "key", "job", "arm", "model", "non_embedding", "parameters", "tokens", "epochs", "seed", "context", "block_size", "topk", "lr",
    "batch_tokens", "flops_6nd", "flops_executed", "train_loss", "heldout_loss", "trailing_loss", "tokens_per_second", "seconds",
    "device", "run_dir", "git",
)  # fmt: skip
POSITION = "loss_from_"
"""Prefix of the columns of held-out loss by position, before the bucket's first position."""
ROWS = "heldout_rows"
"""The last column: losses of each held-out row as JSON, for gaps with intervals; empty where a run has not kept them."""
_NUMBERS = dict.fromkeys(
    ("non_embedding", "parameters", "tokens", "seed", "context", "batch_tokens", "flops_6nd", "flops_executed"), int
) | (dict.fromkeys(("epochs", "lr", "train_loss", "heldout_loss", "trailing_loss", "tokens_per_second", "seconds"), float))
_REQUIRED = frozenset(_NUMBERS) - {"trailing_loss"}
_LAST_STEPS = 20  # whose mean is the training loss at the end

csv.field_size_limit(2**31 - 1)  # by default 128 KiB, which some hundred held-out rows fill


def read(path: Path) -> list[dict[str, str]]:
    """The rows, in the order of the file; none where there is no file. Raises ConfigError for a file that is not of a sweep."""
    if not path.exists():
        return []
    try:
        text = path.read_text()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        rows = list(csv.DictReader(io.StringIO(text), strict=True))  # else a quote left open takes all that follows
    except csv.Error as error:
        raise ConfigError(f"{path}: cannot be read as CSV ({error})") from None
    columns = list(rows[0]) if rows else []
    missing = [name for name in COLUMNS if name not in columns]
    if rows and missing:
        raise ConfigError(f"{path}: is not the results of a sweep; it has no column {missing[0]}")
    damaged = next((number for number, row in enumerate(rows, start=2) if None in row or None in row.values()), None)
    if damaged:
        raise ConfigError(f"{path}: line {damaged} does not have as many values as the header")
    for number, row in enumerate(rows, start=2):
        row.setdefault(ROWS, "")  # results of before runs kept them
        _check_numbers(path, number, row)
    return list({row["key"]: row for row in rows}.values())  # of a job that is there twice, as in files that were joined, the last


def _check_numbers(path: Path, line: int, row: dict[str, str]) -> None:
    for name in (*_NUMBERS, *(name for name in row if name.startswith(POSITION))):
        try:
            fits = not row[name] or math.isfinite(_NUMBERS.get(name, float)(row[name]))
        except ValueError:
            fits = False
        if not fits or (name in _REQUIRED and not row[name]):
            raise ConfigError(f"{path}: line {line} has {row[name]!r} in the column {name}, which is of numbers")


def add(path: Path, row: dict[str, Any]) -> None:
    """Puts a job's row into the file, in place of an older one; several processes may do so at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [old for old in read(path) if old["key"] != row["key"]] + [row]
        columns = [*COLUMNS, *sorted({name for each in rows for name in each if name.startswith(POSITION)}, key=position), ROWS]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue())


def position(column: str) -> int:
    """The first position of a bucket, from its column's name."""
    return int(column.removeprefix(POSITION))


def collect(job: Job, device: str) -> dict[str, Any]:
    """The row of a job that is trained, from its run folder. Raises ConfigError where the folder does not say how it ended."""
    run = job.run
    lines = read_metrics(Path(run.run_dir) / METRICS)
    steps = {line["step"]: line for line in lines if "event" not in line}
    ends = [line for line in lines if line.get("event") == "evaluation" and line["step"] == run.last_step]
    if len(steps) != run.last_step or not ends:
        raise ConfigError(f"{Path(run.run_dir) / METRICS}: lacks steps or the last evaluation; the run cannot be counted")
    if ends[-1]["heldout_loss"] is None:
        raise ConfigError(f"{Path(run.run_dir) / METRICS}: the held-out loss is not finite at the end")
    last, stage, counts = steps[run.last_step], run.stages[-1], parameter_counts(run.model)
    by_position = {int(low): loss for low, loss in ends[-1]["by_position"].items()}
    losses = [line["loss"] for line in steps.values() if line["loss"] is not None]
    moba = next((kind for kind in stage.attention.per_layer(run.model.num_layers) if kind.kind == "moba"), None)
    git = git_state()
    return {
        "key": job.key,
        "job": job.name,
        "arm": arm(run),
        "model": job.model,
        "non_embedding": counts.non_embedding,
        "parameters": counts.total,
        "tokens": last["tokens"],
        "epochs": round(max(last["epochs"].values()), 3),
        "seed": run.seed,
        "context": stage.seq_len,
        "block_size": moba.block_size if moba else "",
        "topk": moba.topk if moba else "",
        "lr": run.optim.lr,
        "batch_tokens": stage.batch_tokens,
        "flops_6nd": 6 * counts.non_embedding * last["tokens"],
        "flops_executed": sum(round(line["flops_executed_per_second"] * line["step_seconds"]) for line in steps.values()),
        "train_loss": statistics.fmean(losses[-_LAST_STEPS:]),
        "heldout_loss": ends[-1]["heldout_loss"],
        "trailing_loss": by_position.get((stage.seq_len - 1) // run.evaluation.position_bucket * run.evaluation.position_bucket, ""),
        "tokens_per_second": round(statistics.median(line["tokens_per_second"] for line in steps.values()), 1),
        "seconds": round(sum(line["step_seconds"] for line in steps.values()), 1),
        "device": device,
        "run_dir": run.run_dir,
        "git": f"{git['commit'] or ''}{'+' if git['dirty'] else ''}",
        ROWS: _heldout_rows(Path(run.run_dir) / HELDOUT, run.last_step),
    } | {f"{POSITION}{low}": loss for low, loss in by_position.items()}


def _heldout_rows(file: Path, last_step: int) -> str:
    """What a run has kept of its last evaluation, on one line; nothing where it was trained before runs did."""
    kept = json.loads(file.read_text()) if file.is_file() else {}
    return json.dumps(kept, separators=(",", ":")) if kept.get("step") == last_step else ""


def arm(run: RunConfig) -> str:
    """What a run is compared by: the attention of its stages in turn, `moba(512, 3) then full`, and the key convolution if it has one."""
    stages = [_attention(stage.attention.rule, stage.attention.per_layer(run.model.num_layers)) for stage in run.stages]
    labels = [label for index, label in enumerate(stages) if index == 0 or label != stages[index - 1]]
    return " then ".join(labels) + (f" + key_conv {run.model.key_conv}" if run.model.key_conv else "")


def _attention(rule: str, layers: Sequence[LayerAttention]) -> str:
    """The label of a rule; where layers differ and MoBA's settings are not in it, with these."""
    label, moba = attention_label(rule, layers), next((str(layer) for layer in layers if layer.kind == "moba"), "")
    return label if moba in label else f"{label}: {moba}"
