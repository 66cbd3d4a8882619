"""The run folder: which run it belongs to, and how each launch of that run was started."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from configs.registry import REPOSITORY, to_mapping
from configs.schema import ConfigError, RunConfig

CONFIG_FILE = "config.json"
# What makes a run the run it is; everything else may change between two launches of it.
_IDENTITY = ("name", "seed", "model", "stages", "data", "optim")
_PACKAGES = ("torch", "deepspeed", "triton", "hydra-core", "datasets", "sentencepiece", "numpy")


def open_run_dir(run: RunConfig, *, world_size: int) -> Path:
    """Creates the folder, or takes up the one an earlier launch made; records config and launch. For rank 0.

    Raises ConfigError where the folder belongs to another run, naming the first key that differs, or to no run.
    """
    folder = Path(run.run_dir)
    check_run_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, json.dumps(to_mapping(run), indent=2) + "\n")
    with (folder / "launches.jsonl").open("a") as launches:
        launches.write(json.dumps(describe_launch(world_size)) + "\n")
    return folder


def check_run_dir(run: RunConfig) -> None:
    """Raises ConfigError unless the folder is new, empty, or this run's own. Writes nothing."""
    folder = Path(run.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir={run.run_dir}: is a file; choose a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"run_dir={run.run_dir}: is not empty and no run made it ({CONFIG_FILE} is missing); choose another folder")
    before, now = json.loads((folder / CONFIG_FILE).read_text()), to_mapping(run)
    for key in _IDENTITY:
        difference = first_difference(before.get(key), now[key], key)
        if difference:
            where, old, new = difference
            raise ConfigError(
                f"run_dir={run.run_dir}: belongs to another run: {where} is {old} there and {new} here; choose another run_dir"
            )


def first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    """The dotted key, old and new value of the first leaf that differs; None where nothing does."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(old.get(name), new.get(name), f"{key}.{name}") for name in sorted(old.keys() | new.keys())]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(*pair, f"{key}.{index}") for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (key, old, new)
    return next((found for pair in pairs if (found := first_difference(*pair))), None)


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
