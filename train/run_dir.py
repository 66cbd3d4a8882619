"""The run folder: which run it belongs to, and how each launch of that run was started."""

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.mapping import first_difference, from_mapping, to_mapping
from configs.registry import REPOSITORY
from configs.schema import ConfigError, RunConfig

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
HELDOUT = "heldout_rows.json"
"""Losses of each held-out row at the last evaluation."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What makes a run the run it is; everything else may change between two launches of it.
IDENTITY = ("seed", "init_from", "model", "stages", "optim")
# Of a stage too, what says how it is computed and not what: another number or kind of GPUs may need it otherwise.
_STAGE_LAYOUT = ("activation",)
_ATTENTION_LAYOUT = ("backend", "workspace_mib")
_PACKAGES = ("torch", "deepspeed", "triton", "hydra-core", "datasets", "transformers", "safetensors", "sentencepiece", "numpy", "wandb")


@contextlib.contextmanager
def own_run_dir(run: RunConfig) -> Iterator[Path]:
    """Holds the run's folder for this launch alone, creating it where needed; for rank 0, before anything is read from it.

    Afterwards a folder that was created here and that nothing was written to is taken away again. Raises ConfigError where
    the folder cannot be made or written, is a file, is not a run's, is in use by another launch, or holds checkpoints of
    another run (naming the first key that differs).
    """
    folder = Path(run.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir={folder}: is a file; choose a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as held:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(folder, os.O_RDONLY)
                held.callback(os.close, lock)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            except OSError as error:
                raise unwritable(f"run_dir={folder}", error) from None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process dies, however it dies
            except OSError:
                raise ConfigError(f"run_dir={folder}: another launch is training in it; wait for its end or choose another") from None
            _check_owner(folder, run)
            yield folder
    finally:
        with contextlib.suppress(OSError):  # the first one that is not empty ends it
            for path in made:
                path.rmdir()


def _check_owner(folder: Path, run: RunConfig) -> None:
    file = folder / CONFIG_FILE
    if not file.is_file():
        if any(folder.iterdir()):
            raise ConfigError(f"run_dir={folder}: is not empty and no run made it ({CONFIG_FILE} is missing); choose another folder")
        return
    if not any((folder / CHECKPOINTS).glob("step_*")):
        return  # a run that came to nothing may start again with other settings
    try:
        before = from_mapping(RunConfig, json.loads(file.read_text()))  # with settings that this version has added
    except ConfigError as error:
        said = f"{CONFIG_FILE} is of another version of this program ({error})"
        raise ConfigError(f"run_dir={folder}: {said}; choose another folder") from None
    except (ValueError, TypeError):
        raise ConfigError(f"run_dir={folder}: {CONFIG_FILE} is damaged; choose another folder") from None
    then, now = _identity(before), _identity(run)
    for key in IDENTITY:
        difference = first_difference(then[key], now[key], key)
        if difference:
            where, old, new = difference
            raise ConfigError(f"run_dir={folder}: belongs to another run: {where} is {old} there and {new} here; choose another run_dir")


def _identity(run: RunConfig) -> dict[str, Any]:
    values = to_mapping(run)
    for stage in values["stages"]:
        for key in _STAGE_LAYOUT:
            del stage[key]
        for key in _ATTENTION_LAYOUT:
            del stage["attention"][key]
    return {key: values[key] for key in IDENTITY}


def checkpoint_of(root: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps among those in `root`."""
    return root / f"step_{step:08d}"


def last_checkpoint(run: RunConfig) -> Path:
    """Where the checkpoint after the run's last step is, once it is trained."""
    return checkpoint_of(Path(run.run_dir) / CHECKPOINTS, run.last_step)


def is_trained(run: RunConfig) -> bool:
    """Whether the run's folder holds the checkpoint after its last step."""
    return last_checkpoint(run).is_dir()


@contextlib.contextmanager
def new_folder(target: Path, key: str) -> Iterator[Path]:
    """A folder beside `target` to write in, which becomes `target` when the block ends well and vanishes when it does not.

    Raises ConfigError, `key` first, where something is there already, or it cannot be written.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{key}={target}: exists; choose another folder, or move it away")
    beside = target.with_name(f".{target.name}.partial")
    made = [path for path in target.parents if not path.exists()]
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a program that was killed
        beside.mkdir(parents=True)
        yield beside
        for path in beside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        raise unwritable(f"{key}={target}", error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first one that is not empty ends it
            for path in made:
                path.rmdir()


def record_launch(run: RunConfig, folder: Path, world_size: int) -> None:
    """Writes the resolved config and one line on this launch. For rank 0. Raises ConfigError where the disk is full."""
    try:
        write_atomically(folder / CONFIG_FILE, json.dumps(to_mapping(run), indent=2) + "\n")
        with (folder / "launches.jsonl").open("a") as launches:
            launches.write(json.dumps(describe_launch(world_size)) + "\n")
    except OSError as error:
        raise unwritable(f"run_dir={folder}", error) from None


def unwritable(what: str, error: OSError) -> ConfigError:
    """The user's side of a failed write: a full disk, or the system's reason."""
    reason = "the disk is full" if error.errno in DISK_FULL else "cannot be written"
    return ConfigError(f"{what}: {reason} ({error.strerror or error})")


def describe_launch(world_size: int) -> dict[str, Any]:
    """How this process was started: time, command line, git state, machine and package versions."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "world_size": world_size,
        "git": git_state(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _program() -> list[str]:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", module.name] if module else ["python", sys.argv[0]]


def git_state() -> dict[str, Any]:
    """`commit` and whether the working tree differs from it; both None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content so that a reader, or a crash, sees the old text or the new one, never a part."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
