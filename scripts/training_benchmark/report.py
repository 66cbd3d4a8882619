"""What training came to, as Markdown, CSV and the lines of a figure."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.schema import TrainBenchmarkConfig, TrainingRow
from model.accounting import parameter_counts
from scripts.figures import plot_over_lengths, short_count
from scripts.training_benchmark.measure import Result
from train.report import table
from train.run_dir import unwritable, write_atomically

Line = tuple[str, str, list[tuple[int, float]]]

FILES = ("train.md", "train.csv", "train.png")
_NONE = "-"
_OF_THE_END = ("host_gib", "pinned_gib", "device", "communication", "communication_exposed")
_HEADER = [
    *("context", "attention", "program"),
    *("tokens/s", "MFU dense-equivalent", "MFU executed", "peak, GiB", "host, GiB", "recompiles", "data wait", "step, s"),
    "communication (exposed)",
]


def markdown(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """The report: a table of all results, and how they were found."""
    run = results[0].case.run
    model = parameter_counts(run.model)
    precision, stage = run.parallel.precision.value, run.parallel.zero_stage
    sections = [
        f"# Training on {device(results)}",
        f"{model.total / 1e6:,.1f}M parameters, {model.non_embedding / 1e6:,.1f}M without embeddings; {precision}, ZeRO {stage}, "
        f"{run.num_ranks} rank{'s' if run.num_ranks > 1 else ''}; torch {facts['torch']}, {facts['date']}.\n\n`{facts['command']}`",
        table(_HEADER, [_row(result) for result in results], texts=3),
        "\n".join(f"- {note}" for note in _notes(results)),
    ]
    return "\n\n".join(sections) + "\n"


def device(results: Sequence[Result]) -> str:
    """What the cases that came to their end ran on."""
    return next((result.end["device"] for result in results if result.end), "an unknown device")


def write(folder: Path, results: Sequence[Result], facts: Mapping[str, str]) -> None:
    """Each file whole, beside and then renamed. Raises ConfigError where one cannot be written."""
    text, values, figure = (folder / name for name in FILES)
    try:
        write_atomically(text, markdown(results, facts))
        write_atomically(values, to_csv(results, facts))
        panels = series(results)
        plot_over_lengths(figure, f"Training on {device(results)}, {facts['date']}", panels, from_zero=panels.keys() - {"tokens/s"})
    except OSError as error:
        raise unwritable(f"output_dir={folder}", error) from None


def _row(result: Result) -> list[str]:
    case = result.case
    named = [f"{short_count(case.stage.seq_len)} × {case.stage.rows}", case.attention, case.row.value]
    if result.problem:
        return [*named, result.problem.partition(":")[0], *[_NONE] * (len(_HEADER) - len(named) - 1)]  # the rest is a note
    speed, least, most = result.tokens_per_second
    mfu = [_NONE if (value := _mfu(result, key)) is None else f"{value:.3f}" for key in ("mfu_dense_equivalent", "mfu_executed")]
    host = result.end["host_gib"]
    pinned = f" ({result.end['pinned_gib']:.1f} pinned)" if result.end["pinned_gib"] else ""
    return [
        *named,
        f"{speed:,.0f} ({least:,.0f} to {most:,.0f})",
        *mfu,
        f"{result.steps[-1]['memory_gib']:.1f}",
        f"{host:.1f}{pinned}",
        _NONE if result.recompiles is None else str(result.recompiles),
        f"{result.median('data_wait'):.1%}",
        f"{result.seconds:.3g}",
        _communication(result),
    ]


def _communication(result: Result) -> str:
    total, exposed = (result.end.get(key) for key in ("communication", "communication_exposed"))
    return _NONE if total is None else f"{total:.1%}" + ("" if exposed is None else f" ({exposed:.1%})")


def _notes(results: Sequence[Result]) -> Iterator[str]:
    run = results[0].case.run
    shapes = "the corpus's rows" if run.real_data else "rows of random tokens, each one document"
    yield f"Context: tokens of a row × rows of a step; {shapes}. Tokens/s: of all ranks, by the median step (slowest to fastest)."
    yield f"Steps of a case: {_counts(results, 'warmup_steps')} to warm up, {_counts(results, 'steps')} that count."
    yield "MFU: of the GPUs' bf16 peak, recomputation not counted; dense-equivalent as if all layers were full attention."
    yield "Peak: of the whole process on the GPU (on a CPU, resident). Host: most that was resident, and that was pinned for the GPU."
    peers = [result for result in results if result.case.row is TrainingRow.TRANSFORMERS and result.end]
    if peers:
        how = "with" if run.checkpointing else "without"
        master = "bf16 weights and Adam states" if run.parallel.precision.value == "bf16" else "fp32"
        yield f"transformers: {peers[0].end['program']}, SDPA, torch's fused AdamW, {master}, {how} gradient checkpointing, one rank."
    if any(result.case.row is TrainingRow.FRAMEWORK for result in results):
        yield "framework: fp32 master weights and Adam states."
    spent = [result for result in results if "communication" in result.end]
    if spent:
        yield (
            f"Communication: share of {_counts(spent, 'traced_steps')} more steps in which collectives ran, waiting for later ranks among "
            "it, and (exposed) in which nothing else did; mean over ranks, of traces in `train/`."
        )
    for problem in dict.fromkeys(result.end["communication_problem"] for result in spent):
        if problem:
            yield f"Communication is not whole: {problem}."
    for length, settings in _changes(run):
        yield f"From {short_count(length)}: {settings}."
    for result in results:
        if result.problem:
            case = result.case
            yield f"{case.row.value}, {case.attention} at {short_count(case.stage.seq_len)}: {result.problem}"


def _counts(results: Sequence[Result], key: str) -> str:
    found = sorted({getattr(result.case.run, key) for result in results})
    return " to ".join(str(count) for count in dict.fromkeys((found[0], found[-1])))


def _changes(run: TrainBenchmarkConfig) -> Iterator[tuple[int, str]]:
    for change in run.changes:
        yield change.from_length, ", ".join(f"`{setting}`" for setting in change.settings)


def to_csv(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """A line for each result: what was measured, its figures, and the facts."""
    lines = [_values(result) | dict(facts) for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _values(result: Result) -> dict[str, Any]:
    case = result.case
    values: dict[str, Any] = {
        "context": case.stage.seq_len,
        "rows": case.stage.rows,
        "attention": case.attention,
        "program": case.row.value,
        "problem": result.problem,
        "ranks": case.num_ranks,
        "steps": len(result.steps),
    }
    if result.steps:
        speed, least, most = result.tokens_per_second
        values |= {"tokens_per_second": speed, "slowest": least, "fastest": most, "step_seconds": result.seconds}
        for key in ("mfu_dense_equivalent", "mfu_executed"):
            values[key] = _mfu(result, key)
        values |= {"memory_gib": result.steps[-1]["memory_gib"], "recompiles": result.recompiles, "data_wait": result.median("data_wait")}
    return values | {key: result.end.get(key) for key in _OF_THE_END}


def _mfu(result: Result, key: str) -> float | None:
    """Of the median step; None where the device's peak is not known."""
    return None if result.steps[0][key] is None else result.median(key)


_PANELS: Mapping[str, Callable[[Result], float | None]] = {
    "tokens/s": lambda result: result.tokens_per_second[0],
    "MFU, executed": lambda result: _mfu(result, "mfu_executed"),
    "peak memory (GiB)": lambda result: result.steps[-1]["memory_gib"],
    "communication (share of a step)": lambda result: result.end.get("communication"),
}


def series(results: Sequence[Result]) -> dict[str, list[Line]]:
    """By panel of a figure, its lines: program, attention and (tokens of a row, figure); panels without a figure are left out."""
    panels: dict[str, list[Line]] = {}
    for name, figure in _PANELS.items():
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for result in results:
            value = None if result.problem else figure(result)
            if value is not None:
                lines.setdefault((result.case.row.value, result.case.attention), []).append((result.case.stage.seq_len, value))
        if lines:
            panels[name] = [(program, attention, points) for (program, attention), points in lines.items()]
    return panels
