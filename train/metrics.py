"""Where a run's figures go: metrics.jsonl always, a live line on the terminal, wandb and TensorBoard when asked."""

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from configs.mapping import to_mapping
from configs.schema import ConfigError, LoggingConfig, RunConfig
from train.run_dir import unwritable, write_atomically

FILE = "metrics.jsonl"
_WANDB_SECONDS = 20  # to reach the server before the run goes on offline


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far in GiB: the allocator's on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class _Sink(Protocol):
    def write(self, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path, first_step: int) -> None:
        """Keeps the lines of steps before `first_step`: a killed launch may have gone past the checkpoint it resumes from."""
        self._path = path
        try:
            if path.exists():
                lines = [line for line in path.read_text().splitlines() if _is_before(line, first_step)]
                write_atomically(path, "".join(f"{line}\n" for line in lines))
            self._file = path.open("a", buffering=1)
        except OSError as error:
            raise unwritable(str(path), error) from None

    def write(self, values: Mapping[str, Any]) -> None:
        # JSON knows no NaN: a loss that is not finite is written as null.
        plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        try:
            self._file.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise unwritable(str(self._path), error) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been said
            self._file.close()


def _is_before(line: str, first_step: int) -> bool:
    try:
        values = json.loads(line)
        step, event = values["step"], values.get("event")
    except (ValueError, TypeError, KeyError, AttributeError):  # the line that a kill cut short
        return False
    # A switch comes after the checkpoint of its step, so the resumed run passes it, and writes it, once more.
    return step < first_step or (step == first_step and event != "switch")


class _Terminal:
    def __init__(self, run: RunConfig, first_step: int) -> None:
        self._every = run.logging.every_steps
        console = Console(file=sys.stderr)
        bar, text = BarColumn(bar_width=20), TextColumn("{task.fields[text]}", markup=False)
        columns = (TextColumn("{task.description}", markup=False), bar, TimeRemainingColumn(compact=True), text)
        self._progress = Progress(*columns, console=console, transient=False) if console.is_terminal else None
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task(run.name, total=run.total_steps, completed=first_step, text="")

    def write(self, values: Mapping[str, Any]) -> None:
        if "event" in values:
            text = " ".join(f"{key}={_short(value)}" for key, value in values.items() if not isinstance(value, (list, dict)))
            self._say(text)
        elif self._progress:
            self._progress.update(self._task, completed=values["step"], text=_line(values))
        elif values["step"] % self._every == 0:
            self._say(_line(values))

    def _say(self, text: str) -> None:
        if self._progress:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            with contextlib.suppress(OSError, ValueError):  # a reader that has left, or a closed stderr, ends no training
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(values: Mapping[str, Any]) -> str:
    mfu = f" mfu {values['mfu_dense_equivalent']:.1%}/{values['mfu_executed']:.1%}" if values["mfu_executed"] is not None else ""
    skipped = f" skipped {values['skipped_steps']}" if values["skipped_steps"] else ""
    return (
        f"step {values['step']} loss {values['loss']:.4f} lr {values['lr']:.2e} norm {values['grad_norm']:.2f} "
        f"tokens {values['tokens'] / 1e6:.2f}M context {values['context']} {values['tokens_per_second']:,.0f} tok/s{mfu} "
        f"mem {values['memory_gib']:.1f}G{skipped}"
    )


class _Wandb:
    def __init__(self, run: RunConfig, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logging.wandb=True: the package wandb is not installed; pip install wandb, or logging=console") from None

        identity = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()  # a resume goes on in the same curve
        settings: dict[str, Any] = {"project": run.logging.project, "name": run.name, "id": identity, "dir": str(folder)}
        settings |= {"resume": "allow", "config": to_mapping(run), "settings": wandb.Settings(init_timeout=_WANDB_SECONDS)}
        mode: Any = os.environ.get("WANDB_MODE", "online" if _has_wandb_key() else "offline")
        if mode not in ("online", "offline", "disabled"):
            raise ConfigError(f"WANDB_MODE={mode}: accepted: online, offline, disabled")
        try:
            self._run = wandb.init(mode=mode, **settings)
        except wandb.errors.Error as error:  # no network, a key that is refused: the figures are kept and can be sent later
            if mode == "offline":
                raise ConfigError(f"logging.wandb=True: {error}") from None
            with contextlib.suppress(OSError):
                print(f"wandb cannot be reached ({' '.join(str(error).split())}); logging offline", file=sys.stderr)
            wandb.teardown()  # its service still holds the run that failed, and refuses a second of the same id
            self._run = wandb.init(mode="offline", **settings)

    def write(self, values: Mapping[str, Any]) -> None:
        self._run.log(_scalars(values), step=values["step"])

    def close(self) -> None:
        self._run.finish()


def _has_wandb_key() -> bool:
    netrc = Path.home() / ".netrc"
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace"))


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        for key, value in _scalars(values).items():
            self._writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        self._writer.close()


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    prefix = f"{values['event']}/" if "event" in values else ""
    grouped = {f"{group}/{key}": value for group, part in values.items() if isinstance(part, dict) for key, value in part.items()}
    return {f"{prefix}{key}": value for key, value in {**values, **grouped}.items() if isinstance(value, (int, float)) and key != "step"}


class Metrics(contextlib.AbstractContextManager["Metrics"]):
    """All sinks of a run as one; on ranks other than 0 it has none."""

    def __init__(self, run: RunConfig, folder: Path, *, first_step: int, is_main: bool) -> None:
        self._sinks: list[_Sink] = _open_sinks(run, run.logging, folder, first_step) if is_main else []

    def step(self, values: Mapping[str, Any]) -> None:
        """One optimizer step; `step` counts finished steps, so the first is 1."""
        self._write(values)

    def event(self, name: str, step: int, **values: Any) -> None:
        """Something that happened after `step` finished steps: an evaluation, a switch, a skipped step, a checkpoint."""
        self._write({"event": name, "step": step, **values})

    def _write(self, values: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(values)

    def __exit__(self, *exception: object) -> None:
        for sink in self._sinks:
            sink.close()


def _open_sinks(run: RunConfig, config: LoggingConfig, folder: Path, first_step: int) -> list[_Sink]:
    sinks: list[_Sink] = [_JsonLines(folder / FILE, first_step)]
    if config.progress:
        sinks.append(_Terminal(run, first_step))
    if config.wandb:
        sinks.append(_Wandb(run, folder))
    if config.tensorboard:
        sinks.append(_TensorBoard(folder, first_step))
    return sinks
