"""Checkpoints that are complete or absent: written beside, checksummed, renamed; `latest` moves last.

run_dir/checkpoints/step_00000200/
    engine/          DeepSpeed's weights and optimizer state, one file a rank
    rng_00000.pt     torch's random state, one file a rank
    state.json       step, stream position, counters, layout (`TrainingState`)
    manifest.json    bytes and BLAKE2 hash of every file above
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs.mapping import first_difference, from_mapping, to_mapping
from configs.schema import CheckpointConfig, ConfigError, RunConfig, ScheduleKind, StageConfig
from train.distributed import Ranks, from_main, gather_objects, on_main
from train.engine import Engine
from train.optim import learning_rate
from train.run_dir import CHECKPOINTS, DISK_FULL, unwritable, write_atomically
from train.stages import place_of

_NAME = re.compile(r"^step_(\d{8})$")
_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything but tensors: `step` counts finished steps, `tokens` those trained on, `stream` is the loader's own state,
    `config` the resolved run."""

    step: int
    tokens: int
    stream: dict[str, Any]
    skipped: int
    skipped_in_a_row: int
    world_size: int
    tokenizer_hash: str
    config: dict[str, Any]
    git: dict[str, Any]

    def run(self) -> RunConfig:
        """The resolved config that the checkpoint was trained under. Raises ConfigError where this version refuses it."""
        try:
            return from_mapping(RunConfig, self.config)
        except ConfigError as error:
            raise ConfigError(f"the config in the checkpoint of step {self.step}: {error}") from None

    def stage(self) -> StageConfig:
        """The stage of the last finished step. Raises ConfigError as `run` does."""
        return place_of(self.run(), max(self.step - 1, 0)).stage


def save(root: Path, engine: Engine, state: TrainingState, config: CheckpointConfig, ranks: Ranks) -> Path:
    """Writes the checkpoint of `state.step`, then lets go of old ones. Every rank calls it.

    Raises ConfigError where the disk is full: what was written is removed, the checkpoints before it stay as they were.
    """
    target, beside = root / f"step_{state.step:08d}", root / f"{_PARTIAL}_{state.step:08d}"
    on_main(ranks, lambda: _make_room(root, beside))
    try:
        engine.save(beside)
        torch.save({"torch": torch.get_rng_state()}, beside / f"rng_{ranks.rank:05d}.pt")
        if ranks.is_main:
            write_atomically(beside / "state.json", json.dumps(asdict(state), indent=2) + "\n")
        files = _hash_files(beside, ranks)
        if ranks.is_main:
            write_atomically(beside / "manifest.json", json.dumps({"step": state.step, "files": files}, indent=2) + "\n")
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        reason = "the disk is full" if _is_full(root, error) else " ".join(str(error).split())
        shutil.rmtree(beside, ignore_errors=True)
        told = ConfigError(f"checkpoint of step {state.step} could not be written to {root}: {reason}; {_newest_text(root)}")
        if not ranks.is_main:  # rank 0 may learn no more than that this one is gone
            print(f"error: rank {ranks.rank}: {told}", file=sys.stderr, flush=True)
        raise told from error
    on_main(ranks, lambda: _publish(root, beside, target, config))  # nobody goes on before the checkpoint is whole
    return target


def _publish(root: Path, beside: Path, target: Path, config: CheckpointConfig) -> None:
    try:
        beside.rename(target)
        _sync_folder(root)
        write_atomically(root / "latest", target.name + "\n")
    except OSError as error:
        raise unwritable(f"checkpoint {target}", error) from None
    _forget_old(root, config)


def _is_full(root: Path, error: Exception) -> bool:
    return (isinstance(error, OSError) and error.errno in DISK_FULL) or shutil.disk_usage(root).free < 2**20


def _make_room(root: Path, beside: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_PARTIAL}_*"):
            shutil.rmtree(leftover)
        beside.mkdir()
    except OSError as error:
        raise unwritable(f"checkpoint {root}", error) from None
    newest = max(_steps(root), default=None)
    needed = sum(file.stat().st_size for file in _files(root / f"step_{newest:08d}")) if newest is not None else 0
    free = shutil.disk_usage(root).free
    if free < needed:
        beside.rmdir()
        raise ConfigError(f"no room for a checkpoint in {root}: the last one takes {needed} bytes, {free} are free; {_newest_text(root)}")


def _newest_text(root: Path) -> str:
    newest = max(_steps(root), default=None)
    return "there is no earlier checkpoint" if newest is None else f"step_{newest:08d} before it is whole"


def _hash_files(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    names = from_main([str(file.relative_to(folder)) for file in _files(folder)] if ranks.is_main else None)
    mine = {name: _fingerprint(folder / name) for name in names[ranks.rank :: ranks.world_size]}
    return {name: entry for part in gather_objects(mine) for name, entry in part.items()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _steps(root: Path) -> list[int]:
    return sorted(int(match[1]) for path in root.glob("step_*") if (match := _NAME.match(path.name)))


def _forget_old(root: Path, config: CheckpointConfig) -> None:
    for step in _steps(root)[: -config.keep_last]:
        if not (config.keep_every and step % config.keep_every == 0):
            shutil.rmtree(root / f"step_{step:08d}")


def set_aside(root: Path, *, after: int) -> None:
    """Renames the checkpoints of steps later than `after` to `damaged_step_…`: a run that goes on from `after` was refused
    them, and they would push whole ones out."""
    for step in _steps(root):
        if step > after:
            aside = root / f"damaged_step_{step:08d}"
            shutil.rmtree(aside, ignore_errors=True)
            (root / f"step_{step:08d}").rename(aside)


def verify(checkpoint: Path) -> None:
    """Raises ConfigError naming the first file that is missing, cut short or changed."""
    manifest = checkpoint / "manifest.json"
    if not manifest.is_file():
        raise ConfigError(f"{checkpoint}: is not a whole checkpoint (manifest.json is missing)")
    try:
        entries = {name: (entry["bytes"], entry["blake2b"]) for name, entry in json.loads(manifest.read_text())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{checkpoint}: is damaged, or not a checkpoint: manifest.json cannot be read as one") from None
    for name, (size, digest) in entries.items():
        path = checkpoint / name
        if not path.is_file():
            raise ConfigError(f"{checkpoint}: is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise ConfigError(f"{checkpoint}: is damaged: {name} has {path.stat().st_size} bytes instead of {size}")
        if _fingerprint(path)["blake2b"] != digest:
            raise ConfigError(f"{checkpoint}: is damaged: the checksum of {name} does not match")


def newest_valid(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `root` that verifies, None where there is none at all; damaged ones are said.

    Raises ConfigError where there are checkpoints and all are damaged: to start anew over them would be a silent loss.
    """
    found = [root / f"step_{step:08d}" for step in reversed(_steps(root))]
    for checkpoint in found:
        try:
            verify(checkpoint)
        except ConfigError as error:
            say(f"{error}; trying the one before it")
        else:
            return checkpoint
    if found:
        raise ConfigError(f"{root}: all {len(found)} checkpoints are damaged; move them away to start anew")
    return None


def choose(resume: str, root: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` (auto, never or a path) asks for; None starts anew. For rank 0.

    A path is where a run begins: once it has checkpoints of its own under `root`, it goes on from the newest of them, so the
    same command line may be launched again. Raises ConfigError for a damaged or missing path (offering the one before it), for a
    path under `root` that later checkpoints follow (two histories in one folder), and for `never` over checkpoints.
    """
    if resume == "never":
        if _steps(root):
            raise ConfigError(f"resume=never: {root} holds checkpoints; choose another run_dir, or resume=auto to go on")
        return None
    if resume == "auto":
        return newest_valid(root, say)
    given = resolve(resume, say)
    own = newest_valid(root, say)
    if own is None or own.samefile(given):
        return given
    if given.resolve().parent == root.resolve():
        raise ConfigError(
            f"resume={resume}: {own.name} comes after it in this run_dir; choose another run_dir for a branch, or move later ones away"
        )
    say(f"{root} holds checkpoints of this run: going on from {own.name}, not from resume={resume} where it began")
    return own


def resolve(path: str, say: Callable[[str], None]) -> Path:
    """A checkpoint folder, or a run's newest valid checkpoint (its folder or `checkpoints` in it); `say` hears of damaged ones.

    Raises ConfigError for a path that is neither or is damaged, offering the whole checkpoint before it.
    """
    given = Path(path)
    if not given.is_dir():
        raise ConfigError(f"{path}: no such checkpoint or run folder")
    folder = given if given.name == CHECKPOINTS else given / CHECKPOINTS
    if folder.is_dir():
        newest = newest_valid(folder, say)
        if newest is None:
            raise ConfigError(f"{path}: the run has no checkpoint yet")
        return newest
    try:
        verify(given)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_offer(given)}") from None
    return given


def _offer(damaged: Path) -> str:
    match = _NAME.match(damaged.name)
    for step in reversed(_steps(damaged.parent)):
        candidate = damaged.parent / f"step_{step:08d}"
        if match and step < int(match[1]):
            try:
                verify(candidate)
            except ConfigError:
                continue
            return f"{candidate} before it is whole"
    return "there is no whole checkpoint before it"


def read_state(checkpoint: Path) -> TrainingState:
    """The state that lies in a verified checkpoint. Raises ConfigError where this version does not know its keys."""
    try:
        return TrainingState(**json.loads((checkpoint / "state.json").read_text()))
    except TypeError as error:
        raise ConfigError(f"{checkpoint / 'state.json'}: is of another version of this program ({error})") from None


def check_fits(state: TrainingState, run: RunConfig, *, tokenizer_hash: str, ranks: Ranks) -> None:
    """Raises ConfigError where the run cannot go on from a checkpoint: another model, tokenizer, ZeRO stage, number of ranks or
    grouping of parameters, or other stages before its step than those it went through."""
    before = state.run()
    differences = [
        ("model", to_mapping(before.model), to_mapping(run.model)),
        ("parallel.zero_stage", before.parallel.zero_stage, run.parallel.zero_stage),
        ("parallel.precision", before.parallel.precision.value, run.parallel.precision.value),
        ("optim.no_decay", sorted(before.optim.no_decay), sorted(run.optim.no_decay)),
        ("the number of ranks", state.world_size, ranks.world_size),
        ("the tokenizer's hash", state.tokenizer_hash, tokenizer_hash),
    ]
    for key, old, new in differences:
        found = first_difference(old, new, key)
        if found:
            where, old, new = found
            raise ConfigError(f"resume={run.resume}: {where} is {old} in the checkpoint of step {state.step} and {new} here")
    if state.step > run.total_steps:
        raise ConfigError(f"resume={run.resume}: the checkpoint is of step {state.step}, the run has {run.total_steps} steps")
    tokens = place_of(run, state.step).tokens_before
    if state.tokens != tokens:
        raise ConfigError(
            f"resume={run.resume}: the checkpoint of step {state.step} has seen {state.tokens} tokens, these stages put {tokens} before "
            "that step; keep the stages it went through and change those after it"
        )
    _check_decay(state, before, run)


def _check_decay(state: TrainingState, before: RunConfig, run: RunConfig) -> None:
    """Raises ConfigError where a wsd schedule would drop at the checkpoint from the learning rate that it was trained at: it is the
    decay of a branch that begins too early, or a warm-up that moved with the length of the run."""
    flat = (ScheduleKind.WSD, ScheduleKind.CONSTANT)
    if run.optim.schedule is not ScheduleKind.WSD or before.optim.schedule not in flat or run.optim.lr != before.optim.lr:
        return
    old, new = (learning_rate(each.optim, state.tokens, each.total_tokens) for each in (before, run))
    if new < old * (1 - 1e-9):  # more than the rounding of a fraction
        left, warmup = run.total_tokens - state.tokens, run.optim.warmup(run.total_tokens)
        remedy = f"set optim.decay_tokens to at most {left}, or lengthen the stages after it"
        if state.tokens < warmup:
            remedy = f"its warm-up lasts {warmup:.0f} tokens; give optim.warmup_tokens as the run it branches off had it"
        raise ConfigError(
            f"resume={run.resume}: the checkpoint of step {state.step} was trained at a learning rate of {old:g}, this schedule has "
            f"{new:g} at its {state.tokens} tokens, and {left} are left: {remedy}"
        )


def restore(checkpoint: Path, engine: Engine, ranks: Ranks) -> None:
    """Loads weights, optimizer and this rank's random state; check layout and model against `read_state` first."""
    engine.load(checkpoint)
    torch.set_rng_state(torch.load(checkpoint / f"rng_{ranks.rank:05d}.pt", weights_only=True)["torch"])
