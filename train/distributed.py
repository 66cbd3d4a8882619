"""Ranks: who we are among the processes of a launch, and the few collectives the trainer needs (torch.distributed only)."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configs.schema import ConfigError, Device

T = TypeVar("T")


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
    """Reads the launcher's environment; without one, sets it up as a single process with a free port."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(alone)
    device = choose_device(wanted, int(os.environ["LOCAL_RANK"]))
    return Ranks(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), device=device)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over ranks, in fp64 so that the order of ranks is lost in rounding."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, on every rank, in rank order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 alone and gives its result to all; a ConfigError there is raised on every rank."""
    outcome: tuple[Any, ConfigError | None] = (None, None)
    if ranks.is_main:
        try:
            outcome = (work(), None)
        except ConfigError as error:
            outcome = (None, error)
    result, mistake = from_main(outcome)
    if mistake is not None:
        raise mistake
    return result
