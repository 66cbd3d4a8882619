"""Checkpoints are written while training goes on, complete or absent.

The step loop is held for a copy to host memory alone. A thread of each rank writes that copy beside, with checksums; when all ranks
have, rank 0 lists the files, renames the folder, and moves `latest` last. What is killed before that leaves the checkpoint before it.
"""

import contextlib
import datetime
import json
import shutil
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import CheckpointConfig, ConfigError
from model.host_memory import host_bytes
from train.checkpoint import ENGINE, TrainingState, files_of, fingerprint, rng_file, steps_of, sync_folder
from train.distributed import Ranks, gather_objects, on_main
from train.engine import Engine
from train.fragments import Fragment, write_fragments
from train.run_dir import DISK_FULL, checkpoint_of, unwritable, write_atomically

_PARTIAL = ".partial"
_PATIENCE = datetime.timedelta(hours=2)  # that a rank which has written waits for one on slower storage


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that has become whole, and what it cost."""

    path: Path
    held_seconds: float
    """That the step loop waited: for the checkpoint before it and for the copy to host memory, or to the end without `background`."""
    written_seconds: float
    """From the copy until it was whole."""


class Saver(contextlib.AbstractContextManager["Saver"]):
    """Writes the checkpoints of a run, one at a time; all its methods but `failed` are called by every rank.

    Leaving it waits for the checkpoint in hand, and says nothing of its failure: `wait` does.
    """

    def __init__(self, root: Path, engine: Engine, config: CheckpointConfig, ranks: Ranks) -> None:
        self._root, self._engine, self._config, self._ranks = root, engine, config, ranks
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # the threads' own: the default group is the step loop's
        self._host = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._saved: list[Saved] = []

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in hand could not be written, as far as this rank knows yet."""
        return self._failure is not None

    def save(self, state: TrainingState) -> None:
        """Begins the checkpoint of `state.step`, once the one before is whole.

        Raises ConfigError where that one failed, or where the disk has no room: the checkpoints before it stay as they were.
        """
        started = time.perf_counter()
        self.wait()
        beside = self._root / f"{_PARTIAL}_{state.step:08d}"
        on_main(self._ranks, lambda: _make_room(self._root, beside))
        fragments, rng = self._engine.fragments(), torch.get_rng_state()
        if self._config.background:
            fragments = self._copy(fragments)
        held = time.perf_counter() - started
        work = (beside, fragments, rng, state, held)
        self._thread = threading.Thread(target=self._keep_outcome, args=work, name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.background:
            self.wait()

    def wait(self) -> None:
        """Returns when no checkpoint is in hand. Raises ConfigError where the last one failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            raise self._failure

    def collect(self) -> list[Saved]:
        """Those that have become whole since the last call, as far as this rank knows yet."""
        done, self._saved = self._saved, []
        return done

    def __exit__(self, *exception: object) -> None:
        if self._thread:
            self._thread.join()
        dist.destroy_process_group(self._group)

    def _copy(self, fragments: list[Fragment]) -> list[Fragment]:
        sizes = [fragment.values.nbytes for fragment in fragments]
        if len(self._host) < sum(sizes):  # page-locking costs more than the copy: the memory is kept
            self._host = host_bytes(sum(sizes), self._ranks.device)
        copied = []
        for fragment, part in zip(fragments, self._host[: sum(sizes)].split(sizes), strict=True):
            values = part.view(fragment.values.dtype).view(fragment.values.shape)
            copied.append(replace(fragment, values=values.copy_(fragment.values, non_blocking=True)))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return copied

    def _keep_outcome(self, beside: Path, fragments: list[Fragment], rng: torch.Tensor, state: TrainingState, held: float) -> None:
        started = time.perf_counter()
        try:
            path = self._write(beside, fragments, rng, state)
            written = time.perf_counter() - started
            held += 0.0 if self._config.background else written
            self._saved.append(Saved(path=path, held_seconds=held, written_seconds=written))
        except Exception as error:
            self._failure = error

    def _write(self, beside: Path, fragments: list[Fragment], rng: torch.Tensor, state: TrainingState) -> Path:
        done = gather_objects(self._write_own(beside, fragments, rng, state), self._group)
        reasons = [reason for _, reason in done if reason]
        if reasons:
            on_main(self._ranks, lambda: shutil.rmtree(beside, ignore_errors=True), self._group)
            told = f"checkpoint of step {state.step} could not be written to {self._root}"
            raise ConfigError(f"{told}: {reasons[0]}; {_newest_text(self._root)}")
        target = checkpoint_of(self._root, state.step)
        manifest = {"step": state.step, "files": {name: entry for files, _ in done for name, entry in files.items()}}
        on_main(self._ranks, lambda: _publish(self._root, beside, target, manifest, self._config), self._group)
        return target

    def _write_own(
        self, beside: Path, fragments: list[Fragment], rng: torch.Tensor, state: TrainingState
    ) -> tuple[dict[str, dict[str, Any]], str | None]:
        """This rank's files, by name as the manifest has them, and None; or why they could not be written."""
        rank = self._ranks.rank
        try:
            files = write_fragments(beside / ENGINE, f"rank_{rank:05d}", fragments)
            files.append(beside / rng_file(rank))
            torch.save({"torch": rng}, files[-1])
            if self._ranks.is_main:
                files.append(beside / "state.json")
                write_atomically(files[-1], json.dumps(asdict(state), indent=2) + "\n")
            return {str(file.relative_to(beside)): fingerprint(file) for file in files}, None
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            return {}, "the disk is full" if _is_full(self._root, error) else f"rank {rank}: {' '.join(str(error).split())}"


def _publish(root: Path, beside: Path, target: Path, manifest: dict[str, Any], config: CheckpointConfig) -> None:
    try:
        write_atomically(beside / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        beside.rename(target)
        sync_folder(root)
        write_atomically(root / "latest", target.name + "\n")
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise unwritable(f"checkpoint {target}", error) from None
    for step in steps_of(root)[: -config.keep_last]:
        if not (config.keep_every and step % config.keep_every == 0):
            shutil.rmtree(checkpoint_of(root, step))


def _is_full(root: Path, error: Exception) -> bool:
    codes = {getattr(error, "errno", None), *(code for code in DISK_FULL if f"os error {code})" in str(error))}  # safetensors has a text
    return not codes.isdisjoint(DISK_FULL) or shutil.disk_usage(root).free < 2**20


def _make_room(root: Path, beside: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_PARTIAL}_*"):
            shutil.rmtree(leftover)
        (beside / ENGINE).mkdir(parents=True)
    except OSError as error:
        raise unwritable(f"checkpoint {root}", error) from None
    newest = max(steps_of(root), default=None)
    needed = sum(file.stat().st_size for file in files_of(checkpoint_of(root, newest))) if newest is not None else 0
    free = shutil.disk_usage(root).free
    if free < needed:
        shutil.rmtree(beside)
        raise ConfigError(f"no room for a checkpoint in {root}: the last one takes {needed} bytes, {free} are free; {_newest_text(root)}")


def _newest_text(root: Path) -> str:
    newest = max(steps_of(root), default=None)
    return "there is no earlier checkpoint" if newest is None else f"{checkpoint_of(root, newest).name} before it is whole"
