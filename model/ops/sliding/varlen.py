"""Sliding-window attention through PyTorch's variable-length FlashAttention: one call for all documents, on CUDA."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

varlen_attn: Callable[..., Any] | None = None
try:
    from torch.nn.attention import varlen

    # Its first releases had neither windows nor grouped heads.
    if inspect.signature(varlen.varlen_attn).parameters.keys() >= {"scale", "window_size", "enable_gqa"}:
        varlen_attn = varlen.varlen_attn
except ImportError:  # PyTorch before 2.10
    pass

_MAX_HEAD_DIM = 256


def refusal(q: Tensor) -> str | None:
    """Why this backend cannot serve a call with queries like q `[T, Hq, D]`; None where it can."""
    if varlen_attn is None:
        return f"PyTorch {torch.__version__} has no varlen_attn with a window"
    if not q.is_cuda:
        return f"q is on {q.device}; accepted: a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q has dtype {q.dtype}; accepted: torch.bfloat16, torch.float16"
    if q.shape[-1] > _MAX_HEAD_DIM or q.shape[-1] % 8:
        return f"q has head dimension {q.shape[-1]}; accepted: multiples of 8 up to {_MAX_HEAD_DIM}"
    return None


def sliding_varlen(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], window: int, softmax_scale: float) -> Tensor:
    """As `sliding_reference`: q `[T, Hq, D]`, k and v `[T, Hkv, D]`, `bounds` `[0, ..., T]`; returns `[T, Hq, D]`."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    assert varlen_attn is not None
    return varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=softmax_scale,
        window_size=(window - 1, 0),  # tokens before and after the query, besides itself
        enable_gqa=q.shape[1] != k.shape[1],
    )
