"""Checkpoints on disk: which one a run goes on from, whether it is whole, and what it holds; `train.saving` writes them.

run_dir/checkpoints/step_00000200/
    engine/          fp32 weights and Adam's moments by parameter (`train.fragments`), files of each rank
    rng_00000.pt     torch's random state, one file a rank
    state.json       step, stream position, counters, config (`TrainingState`)
    manifest.json    bytes and BLAKE2 hash of every file above
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.mapping import first_difference, from_mapping, to_mapping
from configs.schema import ConfigError, RunConfig, ScheduleKind, StageConfig
from train.distributed import Ranks
from train.engine import Engine
from train.fragments import FragmentFolder
from train.optim import learning_rate
from train.run_dir import CHECKPOINTS, checkpoint_of
from train.stages import place_of

_NAME = re.compile(r"^step_(\d{8})$")
ENGINE = "engine"


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


def rng_file(rank: int) -> str:
    """Name of the file with a rank's random state."""
    return f"rng_{rank:05d}.pt"


def files_of(folder: Path) -> list[Path]:
    """All files in a folder and those below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fingerprint(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on the disk afterwards."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


def sync_folder(folder: Path) -> None:
    """Names that were changed in it are on the disk afterwards."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def steps_of(root: Path) -> list[int]:
    """The steps that have a checkpoint under `root`, ascending."""
    return sorted(int(match[1]) for path in root.glob("step_*") if (match := _NAME.match(path.name)))


def set_aside(root: Path, *, after: int) -> None:
    """Renames the checkpoints of steps later than `after` to `damaged_step_…`: a run that goes on from `after` was refused
    them, and they would push whole ones out."""
    for step in steps_of(root):
        if step > after:
            aside = root / f"damaged_step_{step:08d}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint_of(root, step).rename(aside)


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
        if fingerprint(path)["blake2b"] != digest:
            raise ConfigError(f"{checkpoint}: is damaged: the checksum of {name} does not match")


def newest_valid(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `root` that verifies, None where there is none at all; damaged ones are said.

    Raises ConfigError where there are checkpoints and all are damaged: to start anew over them would be a silent loss.
    """
    found = [checkpoint_of(root, step) for step in reversed(steps_of(root))]
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
        if steps_of(root):
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
    for step in reversed(steps_of(damaged.parent)):
        candidate = checkpoint_of(damaged.parent, step)
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


def check_fits(state: TrainingState, run: RunConfig, *, tokenizer_hash: str) -> None:
    """Raises ConfigError where the run cannot go on from a checkpoint: another model or tokenizer, or other stages before its step
    than those it went through. ZeRO stage, precision and number of ranks may be others."""
    before = state.run()
    differences = [
        ("model", to_mapping(before.model), to_mapping(run.model)),
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


def describe_change(state: TrainingState, run: RunConfig, world_size: int) -> str | None:
    """How a run is laid out otherwise than the one that saved `state`; None where it is not."""
    old, new = (_layout(each, ranks) for each, ranks in ((state.run(), state.world_size), (run, world_size)))
    return None if old == new else f"the checkpoint of step {state.step} was saved by {old}; going on with {new}"


def _layout(run: RunConfig, world_size: int) -> str:
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    return f"{ranks} at ZeRO {run.parallel.zero_stage} in {run.parallel.precision.value}"


def restore(checkpoint: Path, state: TrainingState, engine: Engine, ranks: Ranks) -> None:
    """Loads weights, moments and this rank's random state, where it was a rank then; check the model against `state` first.

    Raises ConfigError where an earlier version of this program has saved them.
    """
    engine.load(FragmentFolder(checkpoint / ENGINE), updates=state.step - state.skipped)
    own = checkpoint / rng_file(ranks.rank)
    if own.is_file():
        torch.set_rng_state(torch.load(own, weights_only=True)["torch"])
