"""The live table of a sweep's jobs: what their files say, so that it holds for jobs of any launcher and of an earlier sweep."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from configs.schema import SweepConfig
from scripts.figures import read_metrics
from scripts.launching import is_locked
from scripts.sweeps.jobs import Job
from scripts.sweeps.results import FILE, read
from scripts.sweeps.task import error_file, log_file, trials_file
from train.metrics import FILE as METRICS

_EVERY_SECONDS = 2


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a job is: `waiting`, `training`, `done` or `failed`, and how far."""

    status: str
    step: int = 0
    loss: float | None = None
    """Held out where it is done, else of the last step."""
    tokens_per_second: float | None = None
    error: str = ""


def state_of(config: SweepConfig, job: str, rows: Mapping[str, Mapping[str, str]]) -> State:
    """The state of the job of this name, given the rows of the results by their job."""
    if job in rows:
        row = rows[job]
        return State(status="done", loss=float(row["heldout_loss"]), tokens_per_second=float(row["tokens_per_second"]))
    error = error_file(config, job)
    if error.is_file():
        return State(status="failed", error=error.read_text().strip())
    metrics = Path(config.sweep_dir) / job / METRICS
    steps = [line for line in read_metrics(metrics) if "event" not in line] if metrics.is_file() else []
    status = "training" if is_locked(log_file(config, job)) else "waiting"
    if not steps:
        return State(status=status)
    return State(status=status, step=steps[-1]["step"], loss=steps[-1]["loss"], tokens_per_second=steps[-1]["tokens_per_second"])


class JobTable:
    """Shows all jobs on a terminal's stderr while it is entered; elsewhere a line for each that begins, ends or fails."""

    def __init__(self, config: SweepConfig, jobs: Sequence[Job]) -> None:
        self._config = config
        self._steps = {job.name: job.run.last_step for job in jobs}
        self._keys = {job.key: job.name for job in jobs}
        self._said: dict[str, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "JobTable":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def states(self) -> dict[str, State]:
        """Of all jobs; those of a search as it chooses them."""
        rows = {self._keys.get(row["key"], row["job"]): row for row in read(Path(self._config.sweep_dir) / FILE)}
        chosen = trials_file(self._config)
        names = list(self._steps) or list(dict.fromkeys(chosen.read_text().splitlines() if chosen.exists() else []))
        return {name: state_of(self._config, name, rows) for name in names}

    def _watch(self) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            while not self._ended.wait(_EVERY_SECONDS):
                self._say(self.states())
            self._say(self.states())
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                last = self._ended.is_set()
                live.update(self._table(self.states()), refresh=True)
                if last:
                    return
                self._ended.wait(_EVERY_SECONDS)

    def _say(self, states: Mapping[str, State]) -> None:
        for name, state in states.items():
            if state.status not in ("waiting", self._said.get(name)):
                told = state.error or (f"held-out loss {state.loss:.4f}" if state.status == "done" else "")
                print(f"{time.strftime('%H:%M:%S')} {name} {state.status} {told}".rstrip(), file=sys.stderr, flush=True)
                self._said[name] = state.status

    def _table(self, states: Mapping[str, State]) -> Table:
        done = sum(state.status == "done" for state in states.values())
        table = Table(title=f"{self._config.sweep_dir}: {done} of {len(states)} jobs done")
        for column in ("job", "status", "step", "loss", "tokens/s", ""):
            table.add_column(column, justify="left" if column in ("job", "status", "") else "right")
        for name, state in states.items():
            table.add_row(name, state.status, *self._figures(name, state), Text(state.error))  # a message's brackets are no markup
        return table

    def _figures(self, name: str, state: State) -> list[Any]:
        total = self._steps.get(name)
        step = f"{state.step}/{total}" if total and state.step else str(state.step or "")
        loss = "" if state.loss is None else f"{state.loss:.4f}"
        return [step, loss, "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}"]
