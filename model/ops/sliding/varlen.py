"""Sliding-window attention through PyTorch's variable-length FlashAttention: one call for all documents, on CUDA."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.ops.full import gpu

varlen_attn: Callable[..., Any] | None = None
try:
    from torch.nn.attention import varlen

    # Its first releases had neither windows nor grouped heads.
    if inspect.signature(varlen.varlen_attn).parameters.keys() >= {"scale", "window_size", "enable_gqa"}:
        varlen_attn = varlen.varlen_attn
except ImportError:  # PyTorch before 2.10
    pass


def refusal(q: Tensor) -> str | None:
    """Why this backend cannot serve a call with queries like q `[T, Hq, D]`; None where it can."""
    if varlen_attn is None:
        return f"PyTorch {torch.__version__} has no varlen_attn with a window"
    return gpu.refusal("flash", q)


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
