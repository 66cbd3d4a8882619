"""What the backends for GPUs take, and how they want it to lie in memory."""

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
BACKENDS = ("cudnn", "flash")
DTYPES = (torch.bfloat16, torch.float16)
# cuDNN takes up to 256 on some GPUs in some versions; up to here in all.
_MAX_HEAD_DIM = {"cudnn": 128, "flash": 256}


def refusal(backend: str, q: Tensor) -> str | None:
    """Why a backend of `BACKENDS` cannot serve q `[T, Hq, D]`: the argument, its value and what is accepted; None if it can."""
    head_dim = q.shape[-1]
    if not q.is_cuda:
        return f"q is on {q.device}; accepted: a CUDA device"
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}; accepted: {', '.join(map(str, DTYPES))}"
    if head_dim % 8 or head_dim > _MAX_HEAD_DIM[backend]:
        return f"q has head dimension {head_dim}; accepted: multiples of 8 up to {_MAX_HEAD_DIM[backend]}"
    if compute_capability(q.device) < (8, 0):
        return f"q is on a GPU of compute capability {compute_capability(q.device)}; accepted: (8, 0) and later"
    if not _is_built(backend):
        return f"torch is {torch.__version__}, built without it; accepted: a build with it"
    if backend == "cudnn" and _is_deterministic():
        return "torch.use_deterministic_algorithms is True; accepted: False, as its backward pass adds in no fixed order"
    return None


def _constant(function: T) -> T:
    """What `torch.compiler.assume_constant_result` does; to call it would take seconds, and Triton, for all who import this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def aligned(x: Tensor) -> Tensor:
    """x itself, or a copy where its rows are not dense or begin on no 16 bytes, which the kernels' loads ask for."""
    *steps, last = x.stride()
    # torch.compile traces no addresses, and aligns what it is given.
    first = 0 if torch.compiler.is_compiling() else x.storage_offset()
    in_place = last == 1 and all(step * x.element_size() % 16 == 0 for step in (first, *steps))
    return x if in_place else x.clone(memory_format=torch.contiguous_format)


@_constant
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device: (9, 0) is Hopper."""
    return torch.cuda.get_device_capability(device)


@_constant
def _is_built(backend: str) -> bool:
    return torch.backends.cudnn.is_available() if backend == "cudnn" else torch.backends.cuda.is_flash_attention_available()


@_constant  # as long as nothing changes it: torch.compile's guards on the state of torch see that
def _is_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
