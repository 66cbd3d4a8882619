"""What CUDA graphs read: a graph knows addresses alone, and is replayed when caches may have let go of what was there."""

from collections.abc import Hashable
from typing import TypeVar

import torch

_Tables = TypeVar("_Tables", bound=Hashable)

_read_by_graphs: set[Hashable] = set()


def lasting(tables: _Tables, device: torch.device) -> _Tables:
    """`tables` themselves; kept for good where they are asked for while a graph is captured, which cannot say when it is gone."""
    if _is_capturing(device):
        _read_by_graphs.add(tables)
    return tables


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
