"""Sliding-window attention, literally: the specification of `sliding_attention`."""

import itertools

import torch
from torch import Tensor


def sliding_reference(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], window: int, softmax_scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask) v per document and head, where query t sees keys t-window+1 .. t of its document.

    O(T²), in fp32 (fp64 for fp64 inputs). q `[T, Hq, D]`, k and v `[T, Hkv, D]`, `bounds` the document boundaries
    `[0, ..., T]`; returns `[T, Hq, D]` in q's dtype. Query head h reads key/value head h // (Hq // Hkv).
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        q_doc = q[start:end].to(compute)
        k_doc, v_doc = (x[start:end].to(compute).repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q_doc, k_doc) * softmax_scale
        position = torch.arange(end - start, device=q.device)
        distance = position[:, None] - position
        hidden = (distance < 0) | (distance >= window)
        probs = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", probs, v_doc))
    return torch.cat(outputs).to(q.dtype)
