"""One training under several layouts: the same global batches on other numbers of ranks, ZeRO stages and degrees of sequence parallelism
come to the same losses, but for rounding; so does a run that is killed and goes on with other numbers of ranks.

Each is a launch of `train.main` through the deepspeed CLI, as a user's, to the same step.
"""

import csv
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.checks import check_run
from configs.registry import compose
from configs.schema import ConfigError, Device, EqualityBenchmarkConfig, LayoutConfig, RunConfig
from scripts.figures import read_metrics
from scripts.launching import deepspeed_command, lock_log, trainer, why_it_ended
from train.checkpoint import read_state, steps_of
from train.metrics import FILE
from train.report import table
from train.run_dir import CHECKPOINTS, is_trained, last_checkpoint, unwritable, write_atomically

FILES = ("equality.md", "equality.csv")
_FOLDER = "equality"
_POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training to compare: launches that follow each other, of which all but the last are killed."""

    name: str
    run: RunConfig
    """As its first launch has it, but for its folder."""
    launches: tuple[tuple[LayoutConfig, tuple[str, ...]], ...]
    """The layout of each, and all that `train.main` is told but its folder."""
    is_noise: bool = False
    """Whether it is the first once more: what it differs by is rounding."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to."""

    training: Training
    problem: str = ""
    """Why it did not come to its end; empty where it did."""
    lines: tuple[dict[str, Any], ...] = ()
    """Metrics of each step."""
    stream: Any = None
    """The place in the corpus after the last step, as a checkpoint has it; None without one."""
    resumed: tuple[int, ...] = ()
    """Steps that launches went on from."""

    def values(self, key: str) -> list[float]:
        """A figure of each step."""
        return [line[key] for line in self.lines]


def all_trainings(config: EqualityBenchmarkConfig) -> list[Training]:
    """The first layout, the same again, the other layouts, and what is killed. Raises ConfigError for one that training would refuse."""
    reference, *others = config.layouts
    first = _training(config, str(reference), [reference])
    again, other = replace(first, name=f"{reference}, again"), _other_rows(first.run, reference)
    if other:
        rows = (f"parallel.micro_batch_rows={other}", "parallel.micro_batch_tokens=0")
        again = _training(config, f"{reference}, micro-batches of {other} row{'s' if other > 1 else ''}", [reference], *rows)
    trainings = [first, replace(again, is_noise=True), *(_training(config, str(layout), [layout]) for layout in others)]
    if config.elastic:
        name = "killed: " + " → ".join(map(str, config.elastic))
        every = max(1, config.steps // (2 * len(config.elastic)))
        trainings.append(_training(config, name, config.elastic, f"checkpoint.every_steps={every}"))
    return trainings


def _other_rows(run: RunConfig, layout: LayoutConfig) -> int | None:
    """Rows of a micro-batch by which the same layout sums gradients in another order: one, or two where it takes one already."""
    rows = run.stages[0].rows // run.parallel.data_parallel(layout.num_ranks)
    if run.micro_batch_rows(run.stages[0], layout.num_ranks) > 1:
        return 1
    return 2 if rows % 2 == 0 else None


def _training(config: EqualityBenchmarkConfig, name: str, layouts: Sequence[LayoutConfig], *more: str) -> Training:
    launches, runs = [], []
    for layout in layouts:
        settings = (
            *config.settings,
            f"parallel.zero_stage={layout.zero_stage}",
            f"parallel.sequence_parallel={layout.sequence_parallel}",
            f"max_steps={config.steps}",
            "evaluation.rows=0",
            "checkpoint.every_steps=0",
            "logging.progress=false",
            *more,
        )
        launches.append((layout, settings))
        runs.append(compose(RunConfig, config_name="train", overrides=settings))
        try:
            check_run(runs[-1], world_size=layout.num_ranks)
        except ConfigError as error:
            raise ConfigError(f"{layout}: {error}") from None
    if runs[0].last_step < config.steps:
        raise ConfigError(f"steps={config.steps}: the run has {runs[0].last_step}; more: settings=['stages.0.tokens=N', …]")
    return Training(name=name, run=runs[0], launches=tuple(launches))


def equality_benchmark(config: EqualityBenchmarkConfig, folder: Path, facts: Mapping[str, str]) -> list[Trained]:
    """What all trainings came to; `folder` then holds the files, and what each left behind, without its checkpoints, in `equality/`.

    Raises ConfigError before the first training where one would be refused, and where the first, which the others are set against, fails.
    """
    trainings = all_trainings(config)
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
    results: list[Trained] = []
    for number, training in enumerate(trainings):
        result = _train(training, folder / _FOLDER / f"{number:02d}")
        results.append(result)
        if results[0].problem:
            raise ConfigError(f"{training.name}: {result.problem}")
        said = result.problem or f"losses differ by at most {loss_difference(result, results[0]):.1e}"
        print(f"{training.name}: {said}", file=sys.stderr, flush=True)
        _write(folder, results, facts)
    return results


def _train(training: Training, run_dir: Path) -> Trained:
    """All launches of a training, in a folder that must be new; its checkpoints go when it has ended."""
    run, problem, last = replace(training.run, run_dir=str(run_dir)), "", len(training.launches) - 1
    for number, (layout, settings) in enumerate(training.launches):
        until = None if number == last else run.last_step * (number + 1) // len(training.launches)
        if problem := _launch(run, layout, settings, until, run_dir.with_name(f"{run_dir.name}-{number}.log")):
            break
    lines = read_metrics(run_dir / FILE) if (run_dir / FILE).exists() else []
    stream = read_state(last_checkpoint(run)).stream if is_trained(run) else None
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)
    return Trained(
        training=training,
        problem=problem,
        lines=tuple(line for line in lines if "event" not in line),
        stream=stream,
        resumed=tuple(line["step"] for line in lines if line.get("event") == "resume"),
    )


def _launch(run: RunConfig, layout: LayoutConfig, settings: Sequence[str], until: int | None, log: Path) -> str:
    """Trains to the end or, with `until`, kills all processes after that step. Returns why that did not come about, or nothing."""
    on_cpu = run.device is Device.CPU or not torch.cuda.is_available()
    command = deepspeed_command([*settings, f"run_dir={run.run_dir}"], num_ranks=layout.num_ranks)
    said = lock_log(log, wait=False)
    assert said is not None  # of a folder that we have just made
    with trainer(command, {"DS_ACCELERATOR": "cpu"} if on_cpu else {}, log, said) as process:
        while process.poll() is None:
            if until is not None and _can_go_on(Path(run.run_dir), until):
                os.killpg(process.pid, signal.SIGKILL)
                return ""
            time.sleep(_POLL_SECONDS)
    if until is not None:
        return f"ended with status {process.returncode} before it could be killed after step {until}"
    return "" if is_trained(run) else why_it_ended(log, process.returncode)


def _can_go_on(run_dir: Path, step: int) -> bool:
    """Whether that step is done, and there is a checkpoint."""
    if not steps_of(run_dir / CHECKPOINTS):
        return False
    return max((line["step"] for line in read_metrics(run_dir / FILE)), default=0) >= step


def loss_difference(result: Trained, first: Trained) -> float:
    """The largest in any step, in nats."""
    return max(abs(loss - other) for loss, other in zip(result.values("loss"), first.values("loss"), strict=True))


def norm_difference(result: Trained, first: Trained) -> float:
    """The largest of the gradient's norm in any step, as a share of the first's: a wrong factor shows here though Adam hides it."""
    pairs = zip(result.values("grad_norm"), first.values("grad_norm"), strict=True)
    return max(abs(norm - other) / other for norm, other in pairs)


def is_wrong(result: Trained, first: Trained) -> bool:
    """Whether it failed, or read other rows than the first: what no rounding excuses."""
    return bool(result.problem) or result.stream != first.stream


def _write(folder: Path, results: Sequence[Trained], facts: Mapping[str, str]) -> None:
    try:
        for name, text in zip(FILES, (markdown(results, facts), to_csv(results, facts)), strict=True):
            write_atomically(folder / name, text)
    except OSError as error:
        raise unwritable(f"output_dir={folder}", error) from None


def markdown(results: Sequence[Trained], facts: Mapping[str, str]) -> str:
    """The report: how far each is from the first, and the losses side by side."""
    first, run = results[0], results[0].training.run
    shape = f"{run.stages[0].batch_tokens:,} tokens a step in rows of {run.stages[0].seq_len:,}, {run.parallel.precision.value}"
    about = f"{len(first.lines)} steps of {shape}; torch {facts['torch']}, {facts['date']}, {facts['device']}."
    header = ["layout", "rows", "went on from", "loss differs by", "gradient norm differs by"]
    done = [result for result in results if not result.problem]
    losses = [[str(line["step"]), *(f"{result.lines[index]['loss']:.6f}" for result in done)] for index, line in enumerate(first.lines)]
    sections = [
        "# One training under several layouts",
        f"{about}\n\n`{facts['command']}`",
        table(header, [_row(result, first) for result in results], texts=3),
        "\n".join(f"- {note}" for note in _notes(results)),
        table(["step", *(result.training.name for result in done)], losses, texts=0),
    ]
    return "\n\n".join(sections) + "\n"


def _row(result: Trained, first: Trained) -> list[str]:
    name, resumed = result.training.name, ", ".join(f"step {step}" for step in result.resumed) or "-"
    if result.problem:
        return [name, "-", resumed, result.problem.partition(":")[0], "-"]
    if result is first:
        return [name, "-", resumed, "-", "-"]
    rows = "the same" if result.stream == first.stream else "OTHERS"
    return [name, rows, resumed, f"{loss_difference(result, first):.1e}", f"{norm_difference(result, first):.1e}"]


def _notes(results: Sequence[Trained]) -> Iterator[str]:
    yield "Differences: the largest in any step from the first layout; of the loss in nats, of the gradient's norm as a share of it."
    for result in results:
        if result.training.is_noise and not result.problem:
            yield f"What rounding alone comes to: {loss_difference(result, results[0]):.1e} nats, of {result.training.name!r}."
    yield "Rows: whether the place in the corpus after the last step is the first layout's."
    for result in results:
        if result.problem:
            yield f"{result.training.name}: {result.problem}"


def to_csv(results: Sequence[Trained], facts: Mapping[str, str]) -> str:
    """A line for each step of each training that came to its end, with the facts."""
    figures = ("step", "loss", "grad_norm", "tokens_per_second")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layout", *figures, *facts])
    for result in results:
        if not result.problem:
            writer.writerows([result.training.name, *(line[key] for key in figures), *facts.values()] for line in result.lines)
    return text.getvalue()
