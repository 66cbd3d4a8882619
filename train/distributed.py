"""Ranks: who we are among the processes of a launch, who shares rows, and the few collectives that the trainer needs."""

import atexit
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from configs.schema import ConfigError, Device
from model.sequence_parallel import SequenceParallel
from model.transformer import Transformer

T = TypeVar("T")
_LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `world_size`; `device` is where it computes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes files and prints."""
        return self.rank == 0


def choose_device(wanted: Device, local_rank: int = 0) -> torch.device:
    """The device of a local rank. Raises ConfigError where a GPU is asked for and there is none, or too few."""
    if wanted is Device.CPU or (wanted is Device.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ConfigError(
            f"device={wanted.value}: rank {local_rank} of this machine needs a GPU and torch sees {count}; use device=cpu or fewer ranks"
        )
    return torch.device("cuda", local_rank)


def find_ranks(wanted: Device) -> Ranks:
    """Reads the launcher's environment; without one, sets it up as a single process, which meets nobody: port 0 is any that is free.

    Raises ConfigError where a launcher has set a part of it only, or a GPU is asked for and there is none.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    missing = [name for name in _LAUNCHED_WITH if name not in os.environ]
    if missing:
        raise ConfigError(f"RANK={os.environ['RANK']}: is set but {', '.join(missing)} not; unset it to train in one process")
    device = choose_device(wanted, int(os.environ["LOCAL_RANK"]))
    return Ranks(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), device=device)


def share_rows(model: Transformer, degree: int) -> None:
    """From now on each `degree` consecutive ranks are fed the same rows and share their tokens; 1: none does. Every rank calls it."""
    if degree > 1:
        group, _ = dist.new_subgroups(degree)
        model.sequence_parallel = SequenceParallel(group, model.config)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over ranks, in fp64 so that the order of ranks is lost in rounding."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The value of every rank, on every rank, in rank order; over the default group, or one of all ranks for another thread."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value, on every rank."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=group)
    return holder[0]


def on_main(ranks: Ranks, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `work` on rank 0 alone and gives its result to all.

    Whatever fails there ends every rank: a ConfigError is raised on all of them, since it is the user's and one line tells it;
    of any other exception the others learn the text (RuntimeError), so that none waits for a rank that is gone. A rank that is alone
    needs no process group.
    """
    if ranks.world_size == 1:
        return work()
    result: Any = None
    failure: Exception | None = None
    if ranks.is_main:
        try:
            result = work()
        except Exception as error:
            failure = error
    shared = failure if failure is None or isinstance(failure, ConfigError) else RuntimeError(f"rank 0 failed: {failure!r}")
    result, told = from_main((result, shared), group)
    if told is not None:
        raise failure or told
    return result


def run_to_end(main: Callable[[], None]) -> NoReturn:
    """Runs a program of several ranks and ends its process with the exit status that Python would give it.

    The interpreter is not taken down: a gloo thread that is just letting go of the tensors of its last collective would be
    killed inside a C++ destructor, and abort a process that had done all its work.
    """
    status: Any = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the reader of a pipe
            stream.flush()
    os._exit(status if isinstance(status, int) else status is not None)
