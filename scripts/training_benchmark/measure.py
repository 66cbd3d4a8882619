"""One case after the other in processes of their own, and what they leave behind."""

import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.mapping import to_mapping
from configs.registry import REPOSITORY
from configs.schema import TrainingRow
from scripts.figures import read_metrics
from scripts.training_benchmark.cases import Case
from scripts.training_benchmark.corpus import make_corpus
from scripts.training_benchmark.peer import is_installed
from scripts.training_benchmark.steps import CASE_FILE
from train.metrics import FILE

LOG_FILE = "log.txt"
_OUT_OF_MEMORY, _NOT_INSTALLED = "out of memory", "not installed"
_PROGRAM = "scripts.training_benchmark.steps"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found for one case."""

    case: Case
    problem: str = ""
    """Why the case did not come to its end; empty where it did."""
    lines: tuple[dict[str, Any], ...] = ()
    """Metrics of each step that was taken."""
    end: dict[str, Any] = field(default_factory=dict)
    """What the process said of itself and its machine in the end."""

    @property
    def has_failed(self) -> bool:
        """Whether it ended by what is no result: too little memory is one, and so is a program that is not installed."""
        return bool(self.problem) and self.problem.partition(":")[0] not in (_OUT_OF_MEMORY, _NOT_INSTALLED)

    @property
    def steps(self) -> tuple[dict[str, Any], ...]:
        """The metrics of those that count."""
        first = self.case.run.warmup_steps
        return self.lines[first : first + self.case.run.steps]

    @property
    def seconds(self) -> float:
        """Of a step, the median."""
        return self.median("step_seconds")

    @property
    def tokens_per_second(self) -> tuple[float, float, float]:
        """By the median step, the slowest and the fastest, of all ranks together."""
        times = [line["step_seconds"] for line in self.steps]
        median, slowest, fastest = (self.case.stage.batch_tokens / time for time in (self.seconds, max(times), min(times)))
        return median, slowest, fastest

    @property
    def recompiles(self) -> int | None:
        """Recompilations in the steps that count; None where the run does not count any."""
        counts = [line["recompiles"] for line in self.steps if "recompiles" in line]
        return sum(counts) if counts else None

    def median(self, key: str) -> float:
        """Of a figure of the steps."""
        return statistics.median(line[key] for line in self.steps)


def measure(case: Case, folder: Path, scratch: Path) -> Result:
    """Trains the case in `folder`, which must be new, on a corpus of its own under `scratch` unless it reads a real one.

    Whatever ends its processes is the result's `problem`; the steps that were taken until then are kept.
    """
    if case.row is TrainingRow.TRANSFORMERS and not is_installed():
        return Result(case=case, problem=_NOT_INSTALLED)
    run, stage = case.run, case.stage
    if not run.real_data:
        corpus = scratch / f"rows-of-{stage.seq_len}"
        if not corpus.exists():
            make_corpus(corpus, documents=max(4, stage.rows), document_tokens=stage.seq_len, vocab_size=run.model.vocab_size)
        run = replace(run, data=replace(run.data, prepared_dir=str(corpus.resolve())))
    folder.mkdir(parents=True)
    (folder / CASE_FILE).write_text(json.dumps({"row": case.row.value, "run": to_mapping(replace(run, run_dir=str(folder)))}, indent=2))
    status = _run(case.num_ranks, folder)
    lines = read_metrics(folder / FILE) if (folder / FILE).exists() else []
    return Result(
        case=case,
        problem=_problem(status, (folder / LOG_FILE).read_text(errors="replace")) if status else "",
        lines=tuple(line for line in lines if "event" not in line),
        end=next((line for line in lines if line.get("event") == "end"), {}),
    )


def _run(num_ranks: int, folder: Path) -> int:
    """The exit status of the case's processes, which have all ended when this returns or raises."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m"] if num_ranks > 1 else []
    command = [sys.executable, "-m", *several, _PROGRAM, str(folder.resolve())]
    with (folder / LOG_FILE).open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def _problem(status: int, log: str) -> str:
    """One line for what ended a case, in few words and, after a colon, more: memory, its own error, a signal, a traceback's end."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        before, found, more = line.partition(_OUT_OF_MEMORY)
        if found:
            return f"{_OUT_OF_MEMORY}: {more.strip('. ').partition('. ')[0] or before.rstrip(': ')}"
        if line.startswith("error: "):
            return f"refused: {line.removeprefix('error: ')}"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"failed: {lines[-1] if lines else f'exit status {status}'}"
