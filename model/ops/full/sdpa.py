"""Full causal attention through PyTorch's scaled_dot_product_attention, one call per document."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from model.ops.full.gpu import aligned

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of the tokens it is given, as in `sdpa_heads`."""


def full_sdpa(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], softmax_scale: float) -> Tensor:
    """q `[T, Hq, D]`, k and v `[T, Hkv, D]`, `bounds` the document boundaries `[0, ..., T]`; returns `[T, Hq, D]`.

    Memory is linear in T where PyTorch has a fused kernel for the device and dtype (on the CPU: every dtype).
    """
    attend = partial(sdpa_heads, is_causal=True, softmax_scale=softmax_scale)
    return one_by_one([(attend, end - start) for start, end in itertools.pairwise(bounds)], q, k, v)


def full_cudnn(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], softmax_scale: float) -> Tensor:
    """The same by cuDNN's kernels, bf16 or fp16 on a CUDA device; for documents of one token, which it does not take, by PyTorch's choice.

    Query heads that share keys and values read one copy. Documents are padded to one of `cudnn_length`'s lengths.
    """
    attend = partial(_cudnn_heads, softmax_scale=softmax_scale)
    return one_by_one([(attend, end - start) for start, end in itertools.pairwise(bounds)], *map(aligned, (q, k, v)))


def one_by_one(parts: Sequence[tuple[Attend, int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Consecutive parts of the tokens, which attend to nothing outside: each given by its attention and its number of tokens."""
    attends, lengths = zip(*parts)
    if len(parts) == 1:
        return attends[0](q, k, v)
    # Split at once: its gradient is one concatenation, where that of slices would be a tensor of all tokens for each part.
    inputs = zip(*(x.split(lengths) for x in (q, k, v)))
    return torch.cat([attend(*part) for attend, part in zip(attends, inputs)])


def cudnn_length(length: int) -> int:
    """The least of 16 lengths an octave that is not below `length`, in tokens.

    PyTorch builds a plan for every length that cuDNN is called with and keeps it: hundreds of ms on the host, which the documents of a
    corpus, hardly one as long as another, would pay without end.
    """
    step = max(1, (1 << length.bit_length() - 1) // 16)
    return -(-length // step) * step


def _cudnn_heads(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor:
    # A compiled graph knows one document alone, all the row.
    length = len(q)
    missing = 0 if torch.compiler.is_compiling() else cudnn_length(length) - length
    if missing:  # at the end, where no query of the document looks
        q, k, v = (pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
    with contextlib.nullcontext() if length == 1 else sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = sdpa_heads(q, k, v, is_causal=True, softmax_scale=softmax_scale)
    return out[:length] if missing else out


def sdpa_heads(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, softmax_scale: float) -> Tensor:
    """One sequence in this package's layout: q `[L, Hq, D]`, k and v `[S, Hkv, D]`; returns `[L, Hq, D]`."""
    q_heads, k_heads, v_heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=is_causal, scale=softmax_scale, enable_gqa=is_grouped)
    return out[0].transpose(0, 1)
