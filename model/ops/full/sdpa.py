"""Full causal attention through PyTorch's scaled_dot_product_attention, one call per document."""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def full_sdpa(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], softmax_scale: float) -> Tensor:
    """q `[T, Hq, D]`, k and v `[T, Hkv, D]`, `bounds` the document boundaries `[0, ..., T]`; returns `[T, Hq, D]`.

    Memory is linear in T where PyTorch has a fused kernel for the device and dtype (on the CPU: every dtype).
    """
    documents = [
        sdpa_heads(q[start:end], k[start:end], v[start:end], is_causal=True, softmax_scale=softmax_scale)
        for start, end in itertools.pairwise(bounds)
    ]
    return documents[0] if len(documents) == 1 else torch.cat(documents)


def sdpa_heads(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, softmax_scale: float) -> Tensor:
    """One sequence in this package's layout: q `[L, Hq, D]`, k and v `[S, Hkv, D]`; returns `[L, Hq, D]`."""
    q_heads, k_heads, v_heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=is_causal, scale=softmax_scale, enable_gqa=is_grouped)
    return out[0].transpose(0, 1)
