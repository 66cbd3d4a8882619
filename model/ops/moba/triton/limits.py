"""What the kernels take, told without importing them: Triton may be missing where they are not used."""

import importlib.util
import os

import torch
from torch import Tensor

_HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
_INTERPRETED = (torch.float16, torch.float32)  # Triton's interpreter computes bfloat16 wrongly, and says nothing
_MAX_BLOCK, _MAX_TOPK = 32768, 64
# (query, slot) pairs that are sorted on chip together, at most. A key of 31 bits holds a pair's place, and the block in what is left.
MOST_SORTED = 4096
_MAX_BLOCKS = (1 << 31) // MOST_SORTED - 1  # the highest key of one more would be the one that stands for none
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def refusal(q: Tensor, k: Tensor, *, num_docs: int, block_size: int, topk: int) -> str | None:
    """Why these kernels cannot serve a valid call, naming the argument, its value and what is accepted; None if they can."""
    num_tokens, num_heads, head_dim = q.shape
    sizes = {"num_tokens": num_tokens, "head_dim": head_dim, "group": num_heads // k.shape[1], "num_docs": num_docs}
    refused = refused_kind(q.device, q.dtype) or refused_sizes(**sizes, block_size=block_size, topk=topk)
    return refused or (None if _HAS_TRITON else "the package triton is not installed")


def refused_kind(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same of device and dtype alone."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"q is on {device}; accepted: a CUDA device"
    dtypes = _INTERPRETED if interpreted else DTYPES
    if dtype not in dtypes:
        return f"q has dtype {dtype}; accepted: {', '.join(map(str, dtypes))}"
    return None


def refused_sizes(*, num_tokens: int, head_dim: int, group: int, num_docs: int, block_size: int, topk: int) -> str | None:
    """The same of sizes alone; `group` is the query heads of a key head, `num_docs` the documents."""
    choices, blocks = num_tokens * (topk - 1) * group, most_blocks(num_tokens, num_docs, block_size)
    if head_dim not in _HEAD_DIMS:
        return f"q has head dimension {head_dim}; accepted: {', '.join(map(str, _HEAD_DIMS))}"
    if block_size % 64 or not 64 <= block_size <= _MAX_BLOCK:
        return f"block_size={block_size}; accepted: multiples of 64 up to {_MAX_BLOCK}"
    if topk > _MAX_TOPK:
        return f"topk={topk}; accepted: 1 to {_MAX_TOPK}"
    if choices >= 1 << 31:
        return f"T={num_tokens}, topk={topk} and {group} query heads for each key head make {choices} choices; accepted: below 2**31"
    if blocks > _MAX_BLOCKS:
        return f"T={num_tokens}, block_size={block_size} and {num_docs} documents make up to {blocks} blocks; accepted: {_MAX_BLOCKS}"
    return None


def most_blocks(num_tokens: int, num_docs: int, block_size: int) -> int:
    """Blocks that so many documents of so many tokens have at most: each may end with a short one."""
    return num_tokens // block_size + num_docs
