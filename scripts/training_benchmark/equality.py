"""One training under several layouts: the same global batches on other numbers of ranks, ZeRO stages and degrees of sequence parallelism
come to the same losses, but for rounding; so does a run that is killed and goes on with other numbers of ranks.

Each is a launch of `train.main` through the deepspeed CLI, as a user's, to the same step.
"""

import csv
import io
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.registry import compose
from configs.schema import ConfigError, Device, EqualityBenchmarkConfig, LayoutConfig, RunConfig
from scripts.figures import read_metrics
from scripts.launching import deepspeed_command, kill, last_lines, lock_log, trainer, why_it_ended
from scripts.training_benchmark.checks import check_training
from train.metrics import FILE
from train.report import table
from train.run_dir import CHECKPOINTS, checkpoint_of, unwritable, write_atomically

FILES = ("equality.md", "equality.csv")
_FOLDER = "equality"
_POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One start of `train.main`."""

    layout: LayoutConfig
    settings: tuple[str, ...]
    """All that it is told but its folder."""
    killed_after: int = 0
    """The step after which it is killed, at the latest the one after its checkpoint; 0: it comes to the run's end, and saves nothing."""

    @property
    def saved_after(self) -> int:
        """The step of the one checkpoint of a launch that is killed: the next goes back to it, where there is room for that."""
        return max(1, self.killed_after - 1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training to compare: launches that follow each other, of which all but the last are killed."""

    name: str
    run: RunConfig
    """As its first launch has it, but for its folder."""
    launches: tuple[Launch, ...]
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
    resumed: tuple[int, ...] = ()
    """Steps that launches went on from."""

    def values(self, key: str) -> list[float]:
        """A figure of each step."""
        return [line[key] for line in self.lines]

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """What is known of each step's rows: their tokens by source and by length of the document, and how far they are in the corpus."""
        return [tuple(line[key] for key in ("tokens_by", "padding", "epochs")) for line in self.lines]


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
        trainings.append(_training(config, "killed: " + " → ".join(map(str, config.elastic)), config.elastic))
    return trainings


def _other_rows(run: RunConfig, layout: LayoutConfig) -> int | None:
    """Rows of a micro-batch by which the same layout sums gradients in another order: one, or two where it takes one already."""
    rows = run.stages[0].rows // run.parallel.data_parallel(layout.num_ranks)
    if run.micro_batch_rows(run.stages[0], layout.num_ranks) > 1:
        return 1
    return 2 if rows % 2 == 0 else None


def _training(config: EqualityBenchmarkConfig, name: str, layouts: Sequence[LayoutConfig], *more: str) -> Training:
    launches, runs = [], []
    for number, layout in enumerate(layouts, start=1):
        launch = Launch(layout=layout, settings=(), killed_after=config.steps * number // len(layouts) if number < len(layouts) else 0)
        # Held while it is written: else a short run could come to its end before it is whole.
        saves = (f"checkpoint.every_steps={launch.saved_after}", "checkpoint.background=false")
        settings = (
            *config.settings,
            f"parallel.zero_stage={layout.zero_stage}",
            f"parallel.sequence_parallel={layout.sequence_parallel}",
            f"max_steps={config.steps}",
            "evaluation.rows=0",
            "checkpoint.at_end=false",
            *(saves if launch.killed_after else ("checkpoint.every_steps=0",)),
            "logging.progress=false",
            *more,
        )
        launches.append(replace(launch, settings=settings))
        runs.append(compose(RunConfig, config_name="train", overrides=settings))
        try:
            check_training(runs[-1], num_ranks=layout.num_ranks)
        except ConfigError as error:
            raise ConfigError(f"{layout}: {error}") from None
    if runs[0].last_step < config.steps:
        raise ConfigError(f"steps={config.steps}: the run has {runs[0].last_step}; more: settings=['stages.0.tokens=N', …]")
    return Training(name=name, run=runs[0], launches=tuple(launches))


def equality_benchmark(trainings: Sequence[Training], folder: Path, facts: Mapping[str, str], *, patience: int) -> list[Trained]:
    """What all trainings came to; `folder` then holds the files, and what each left behind, without its checkpoints, in `equality/`.
    Says what each launch took.

    Raises ConfigError where the first training, which the others are set against, fails.
    """
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
    results: list[Trained] = []
    for number, training in enumerate(trainings):
        result = _train(training, folder / _FOLDER / f"{number:02d}", patience)
        results.append(result)
        if results[0].problem:
            raise ConfigError(f"{training.name}: {result.problem}")
        _say(f"{training.name}: {result.problem or f'losses differ by at most {loss_difference(result, results[0]):.1e}'}")
        _write(folder, results, facts)
    return results


def _train(training: Training, run_dir: Path, patience: int) -> Trained:
    """All launches of a training, in a folder that must be new; its checkpoints go when it has ended."""
    run, problem = replace(training.run, run_dir=str(run_dir)), ""
    for number, launch in enumerate(training.launches):
        log, started = run_dir.with_name(f"{run_dir.name}-{number}.log"), time.monotonic()
        problem = _launch(run, launch, log, patience)
        took = f"{launch.layout}, launch {number + 1} of {len(training.launches)}: {time.monotonic() - started:.0f} s"
        if problem:
            _say(f"{took}, failed; the end of {log}:\n{last_lines(log)}")
            break
        lines, resumed = _steps(run_dir), _resumed(run_dir)
        own = [line["step_seconds"] for line in lines if line["step"] > (resumed[-1] if resumed else 0)]
        _say(f"{took}, {sum(own):.0f} s of them in its {len(own)} steps")
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)
    return Trained(training=training, problem=problem, lines=tuple(_steps(run_dir)), resumed=tuple(_resumed(run_dir)))


def _launch(run: RunConfig, launch: Launch, log: Path, patience: int) -> str:
    """Trains to the end, or to where it is killed. Returns why that did not come about, or nothing."""
    on_cpu = run.device is Device.CPU or not torch.cuda.is_available()
    command = deepspeed_command([*launch.settings, f"run_dir={run.run_dir}"], num_ranks=launch.layout.num_ranks)
    said = lock_log(log, wait=False)
    assert said is not None  # of a folder that we have just made
    run_dir, until = Path(run.run_dir), launch.killed_after
    saved = checkpoint_of(run_dir / CHECKPOINTS, launch.saved_after)
    done, since = 0, time.monotonic()
    with trainer(command, {"DS_ACCELERATOR": "cpu"} if on_cpu else {}, log, said) as process:
        while process.poll() is None:
            if (now := max((line["step"] for line in _steps(run_dir)), default=0)) != done:
                done, since = now, time.monotonic()
            if until and done >= until and saved.is_dir():
                kill(process)
                return ""
            if time.monotonic() - since > patience:
                kill(process)  # a rank that waits for another does not hear of softer signals
                return f"hung: no step after step {done} in patience={patience} s; see {log}"
            time.sleep(_POLL_SECONDS)
    if until and process.returncode == 0:
        return f"came to its end before it could be killed after step {until}"
    ended = process.returncode == 0 and len(_steps(run_dir)) == run.last_step
    return "" if ended else why_it_ended(log, process.returncode)


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics of the steps so far."""
    return [line for line in _lines(run_dir) if "event" not in line]


def _resumed(run_dir: Path) -> list[int]:
    """Steps that launches went on from, so far."""
    return [line["step"] for line in _lines(run_dir) if line.get("event") == "resume"]


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / FILE) if (run_dir / FILE).exists() else []


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def loss_difference(result: Trained, first: Trained) -> float:
    """The largest in any step, in nats."""
    return max(abs(loss - other) for loss, other in zip(result.values("loss"), first.values("loss"), strict=True))


def norm_difference(result: Trained, first: Trained) -> float:
    """The largest of the gradient's norm in any step, as a share of the first's: a wrong factor shows here though Adam hides it."""
    pairs = zip(result.values("grad_norm"), first.values("grad_norm"), strict=True)
    return max(abs(norm - other) / other for norm, other in pairs)


def is_wrong(result: Trained, first: Trained) -> bool:
    """Whether it failed, or read other rows than the first: what no rounding excuses."""
    return bool(result.problem) or result.rows != first.rows


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
    rows = "the same" if result.rows == first.rows else "OTHERS"
    return [name, rows, resumed, f"{loss_difference(result, first):.1e}", f"{norm_difference(result, first):.1e}"]


def _notes(results: Sequence[Trained]) -> Iterator[str]:
    yield "Differences: the largest in any step from the first layout; of the loss in nats, of the gradient's norm as a share of it."
    for result in results:
        if result.training.is_noise and not result.problem:
            yield f"What rounding alone comes to: {loss_difference(result, results[0]):.1e} nats, of {result.training.name!r}."
    yield "Rows: whether each step's tokens by source and document length, and its place in the corpus, are the first layout's."
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
