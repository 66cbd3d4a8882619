"""How programs start trainings: the deepspeed CLI in a session of its own, with all that it says in a log that is locked while it lives."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from configs.schema import ConfigError


def deepspeed_command(arguments: Sequence[str], *, num_ranks: int | None = 1) -> list[str]:
    """`train.main` with `arguments` under the deepspeed CLI, with a master port that is free; None: a rank to each of
    CUDA_VISIBLE_DEVICES. Raises ConfigError where there is no such command."""
    found = shutil.which("deepspeed", path=_path())
    if found is None:
        raise ConfigError("deepspeed: no such command beside this Python or on PATH; bash scripts/setup.sh installs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [] if num_ranks is None else ["--num_gpus", str(num_ranks)]
    return [found, "--module", "--no_local_rank", *ranks, "--master_port", str(port), "train.main", *arguments]


def _path() -> str:
    """The launcher starts `python`, which must be this one."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def lock_log(path: Path, *, wait: bool) -> IO[bytes] | None:
    """Opens a log for one writer and what that starts, and empties it. Where another has it: waits for its end, or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        return None
    file.truncate(0)
    return file


def is_locked(path: Path) -> bool:
    """Whether a program that writes this log is alive."""
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def wait_for_heirs(log: Path) -> None:
    """Waits until nobody holds the log's lock: the deepspeed CLI ends before the processes that it has started."""
    with log.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def start(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """In a session of its own: signals come to it, and to all that it starts, through us alone. All of these hold the lock on the log."""
    changed = {**os.environ, "PATH": _path(), **environment}
    return subprocess.Popen(command, env=changed, start_new_session=True, stdout=log, stderr=log)


@contextlib.contextmanager
def trainer(command: Sequence[str], environment: Mapping[str, str], log: Path, file: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A training that writes `log`, whose lock `file` it takes over; when the block is left it is told to end, and all of it is over."""
    with file:  # from here on it is locked by the trainer alone
        process = start(command, environment, file)
    try:
        yield process
    finally:
        stop(process)
        process.wait()
        wait_for_heirs(log)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Tells a program, and all that it has started, to end. Training saves first."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a program, and all that it has started, where it stands."""
    os.killpg(process.pid, signal.SIGKILL)


def last_error(log: Path) -> str | None:
    """The line in which a training's log tells the user's mistake, `error: …`; None where there is none."""
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
    return errors[-1] if errors else None


def last_lines(log: Path, count: int = 10) -> str:
    """The end of a log, without empty lines."""
    return "\n".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-count:])


def why_it_ended(log: Path, status: int) -> str:
    """In one line, why a training ended before its last step: the user's mistake, or where to look."""
    return (last_error(log) or "").removeprefix("error: ") or f"training ended with status {status} before its last step; see {log}"
