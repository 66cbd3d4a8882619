"""What the kernels take, told without importing them: Triton may be missing where they are not used."""

import os

import torch
from torch import Tensor

_HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
_INTERPRETED = (torch.float16, torch.float32)  # Triton's interpreter computes bfloat16 wrongly, and says nothing
_MAX_BLOCK, _MAX_TOPK = 32768, 64


def refusal(q: Tensor, k: Tensor, *, block_size: int, topk: int) -> str | None:
    """Why these kernels cannot serve a valid call, naming the argument, its value and what is accepted; None if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    num_tokens, num_heads, head_dim = q.shape
    if not q.is_cuda and not interpreted:
        return f"q is on {q.device}; accepted: a CUDA device"
    dtypes = _INTERPRETED if interpreted else DTYPES
    if q.dtype not in dtypes:
        return f"q has dtype {q.dtype}; accepted: {', '.join(map(str, dtypes))}"
    group = num_heads // k.shape[1]
    return refused_sizes(num_tokens=num_tokens, head_dim=head_dim, group=group, block_size=block_size, topk=topk)


def refused_sizes(*, num_tokens: int, head_dim: int, group: int, block_size: int, topk: int) -> str | None:
    """The same of sizes alone; `group` is the query heads of a key head."""
    choices = num_tokens * (topk - 1) * group
    if head_dim not in _HEAD_DIMS:
        return f"q has head dimension {head_dim}; accepted: {', '.join(map(str, _HEAD_DIMS))}"
    if block_size % 64 or not 64 <= block_size <= _MAX_BLOCK:
        return f"block_size={block_size}; accepted: multiples of 64 up to {_MAX_BLOCK}"
    if topk > _MAX_TOPK:
        return f"topk={topk}; accepted: 1 to {_MAX_TOPK}"
    if choices >= 1 << 31:
        return f"T={num_tokens}, topk={topk} and {group} query heads for each key head make {choices} choices; accepted: below 2**31"
    return None
