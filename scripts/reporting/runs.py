"""A page on one run, out of what training leaves in its folder."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.schema import ConfigError
from scripts.figures import read_metrics, short_count
from scripts.reporting.charts import Points, curves, heat_map, short
from scripts.reporting.left import left_sections
from scripts.reporting.page import Figure, Fold, Page, Section, Table
from train.metrics import FILE as METRICS
from train.run_dir import CONFIG_FILE

Line = dict[str, Any]

# Figures of a step that are drawn together, or under a better name than their own; any other is drawn by itself.
_PANELS: Mapping[str, Sequence[str]] = {
    "learning rate": ["lr"],
    "gradient norm, before clipping": ["grad_norm"],
    "tokens/s": ["tokens_per_second"],
    "MFU": ["mfu_executed", "mfu_dense_equivalent"],
    "peak memory (GiB)": ["memory_gib"],
    "share of the step that waits for data": ["data_wait"],
    "context (tokens of a row)": ["context"],
}
_NOT_DRAWN = {"step", "tokens", "loss", "step_seconds", "flops_executed_per_second"}
# Figures without which a line is damaged: of a step, and of events that are drawn.
_NEEDED: Mapping[str, set[str]] = {
    "": {"tokens", "loss", "tokens_per_second", "memory_gib"},
    "evaluation": {"heldout_loss"},
    "gate": {"heads"},
}
_LAST = 50  # part of the steps whose mean is the loss at the end


def is_run(folder: Path) -> bool:
    """Whether training has written its metrics there."""
    return (folder / METRICS).is_file()


def run_page(folder: Path) -> Page:
    """All there is to say of a run. Raises ConfigError where it has not taken a step."""
    lines, notes = read_lines(folder)
    steps, events = steps_of(lines), [line for line in lines if "event" in line]
    if not steps:
        raise ConfigError(f"folder={folder}: {METRICS} has no step yet")
    config = _read_config(folder / CONFIG_FILE)
    if not config:
        notes.append(f"{CONFIG_FILE} is not there: neither stages nor settings are shown.")
    return Page(
        title=str(config.get("name", folder.name)),
        subtitle=str(folder),
        facts=_facts(steps, events, config),
        sections=[
            Section(title="Training", figures=list(_curves(steps, events))),
            Section(title="Stages", tables=_stages(config)),
            Section(title="Held-out loss by position", figures=_positions(events)),
            Section(title="What MoBA's gates choose", figures=list(_gates(events))),
            *left_sections(folder),
            Section(title="Events", tables=_events(events)),
            Section(title="Settings and launches", tables=_launches(folder), folds=_settings(config)),
        ],
        notes=notes,
    )


def read_lines(folder: Path) -> tuple[list[Line], list[str]]:
    """Steps and events of a run, and a note where lines of its file are damaged, as a kill leaves them, and left out."""
    file = folder / METRICS
    lines = [line for line in read_metrics(file) if {"step", *_NEEDED.get(line.get("event", ""), ())} <= line.keys()]
    damaged = sum(bool(text.strip()) for text in file.read_text(errors="replace").splitlines()) - len(lines)
    return lines, [f"Damaged lines of {file}, left out: {damaged:,}."] if damaged else []


def steps_of(lines: Sequence[Line]) -> list[Line]:
    """The lines of steps, which begin anew where a resumed run has repeated some."""
    return list({line["step"]: line for line in lines if "event" not in line}.values())


def loss_points(steps: Sequence[Line]) -> Points:
    """(tokens, training loss) of the steps that have one."""
    return [(line["tokens"], line["loss"]) for line in steps if line["loss"] is not None]


def _facts(steps: Sequence[Line], events: Sequence[Line], config: Line) -> list[tuple[str, str]]:
    last, losses = steps[-1], [loss for _, loss in loss_points(steps)]
    heldout = [line["heldout_loss"] for line in events if line["event"] == "evaluation" and line["heldout_loss"] is not None]
    total = sum(-(-stage["tokens"] // stage["batch_tokens"]) for stage in config.get("stages", ()))
    facts = [("steps", f"{last['step']:,}" + (f" of {total:,}" if total else "")), ("tokens", short(last["tokens"]))]
    if losses:
        end = losses[-max(1, len(losses) // _LAST) :]
        facts.append(("training loss", f"{statistics.fmean(end):.4f}"))
    if heldout:
        facts.append(("held-out loss", f"{heldout[-1]:.4f}"))
    facts.append(("tokens/s, median", f"{statistics.median(line['tokens_per_second'] for line in steps):,.0f}"))
    mfu = [line["mfu_executed"] for line in steps if line.get("mfu_executed") is not None]
    if mfu:
        facts.append(("MFU executed, median", f"{statistics.median(mfu):.3f}"))
    facts.append(("peak memory", f"{max(line['memory_gib'] for line in steps):.1f} GiB"))
    facts.append(("skipped steps", str(last.get("skipped_steps", 0))))
    return facts


def _curves(steps: Sequence[Line], events: Sequence[Line]) -> Iterator[Figure]:
    tokens = {0: 0} | {line["step"]: line["tokens"] for line in steps}
    lines = {"training": loss_points(steps)}
    heldout = [line for line in events if line["event"] == "evaluation" and line["heldout_loss"] is not None and line["step"] in tokens]
    if heldout:
        lines["held out"] = [(tokens[line["step"]], line["heldout_loss"]) for line in heldout]
    yield _over_tokens("loss (nats a token)", {name: points for name, points in lines.items() if points}, dots=["held out"])
    grouped = {key for keys in _PANELS.values() for key in keys}
    numbers = dict.fromkeys(key for line in steps for key, value in line.items() if isinstance(value, (int, float)))
    others = {key.replace("_", " "): [key] for key in numbers if key not in _NOT_DRAWN | grouped}
    for caption, keys in {**_PANELS, **others}.items():
        found = {key: [(line["tokens"], line[key]) for line in steps if line.get(key) is not None] for key in keys}
        drawn = {key.replace("_", " "): points for key, points in found.items() if points}
        if any(len({value for _, value in points}) > 1 for points in drawn.values()):  # what stands still needs no drawing
            yield _over_tokens(caption, drawn)


def _over_tokens(caption: str, lines: Mapping[str, Points], dots: Sequence[str] = ()) -> Figure:
    return Figure(caption=caption, content=curves(lines, x="training tokens", dots=dots))


def _stages(config: Line) -> list[Table]:
    rows = [
        [
            stage["name"],
            stage["attention"]["rule"],
            f"{stage['attention']['block_size']}, {stage['attention']['topk']}",
            " ".join(f"{key}={value}" for key, value in stage["rope"].items() if key in ("theta", "scaling", "factor")),
            short(stage["tokens"]),
            short_count(stage["seq_len"]),
            short(stage["batch_tokens"]),
        ]
        for stage in config.get("stages", ())
    ]
    header = ["stage", "attention", "block size, top-k of plain moba", "positions", "tokens", "context", "tokens a step"]
    return [Table(header=header, rows=rows, texts=4)] if rows else []


def _positions(events: Sequence[Line]) -> list[Figure]:
    """The first and the last evaluation that tell loss by position."""
    told = [line for line in events if line["event"] == "evaluation" and line.get("by_position")]
    lines = {
        f"step {line['step']:,}": [(int(low), loss) for low, loss in line["by_position"].items() if loss is not None]
        for line in [*told[:1], *told[-1:]]
    }
    shown = {name: points for name, points in lines.items() if len(points) > 1}
    return [Figure(caption="loss (nats a token) from each position on", content=curves(shown, x="position in the row"))] if shown else []


def _gates(events: Sequence[Line]) -> Iterator[Figure]:
    """Means over layers as they were in training, and each head as it was in the end."""
    gates = [line for line in events if line["event"] == "gate"]
    if not gates:
        return
    last = gates[-1]
    for name in last["heads"]:
        points = [(line["step"], statistics.fmean(line[name].values())) for line in gates if line.get(name)]
        if len(points) > 1:
            yield Figure(caption=f"{name.replace('_', ' ')}, mean over layers and heads", content=curves({name: points}, x="step"))
    for name, layers in last["heads"].items():
        if any(layers):
            caption = f"{name.replace('_', ' ')} of each head, step {last['step']:,}"
            yield Figure(caption=caption, content=heat_map(layers, x="head", y="layer"))


def _events(events: Sequence[Line]) -> list[Table]:
    """What happened besides evaluations and checkpoints, which are many."""
    rows = []
    for line in events:
        if line["event"] not in ("evaluation", "checkpoint", "gate"):
            told = {key: value for key, value in line.items() if key not in ("event", "step")}
            rows.append([f"{line['step']:,}", line["event"], ", ".join(f"{key}={value}" for key, value in told.items())])
    return [Table(header=["step", "event", "what"], rows=rows, texts=3)] if rows else []


def _launches(folder: Path) -> list[Table]:
    file = folder / "launches.jsonl"
    rows = []
    for launch in read_metrics(file) if file.is_file() else []:
        git = launch["git"]
        commit = f"{(git['commit'] or 'unknown')[:12]}{' with changes' if git['dirty'] else ''}"
        packages = ", ".join(f"{name} {version}" for name, version in launch["packages"].items() if version)
        rows.append([launch["time"], launch["command"], commit, launch["machine"], packages, str(launch["world_size"])])
    return [Table(header=["launched", "command", "commit", "machine", "packages", "ranks"], rows=rows, texts=5)] if rows else []


def _settings(config: Line) -> list[Fold]:
    return [Fold(summary="All settings", text=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))] if config else []


def _read_config(path: Path) -> Line:
    """Empty where there is no file, as in a folder of metrics alone. Raises ConfigError for one that is damaged."""
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
        _stages(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{path}: is not the settings of a run") from None
    return config
