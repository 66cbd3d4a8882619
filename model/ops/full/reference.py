"""Full causal attention, literally: the specification of `full_attention`."""

import itertools

import torch
from torch import Tensor


def full_reference(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], softmax_scale: float) -> Tensor:
    """softmax(scale · q kᵀ + causal mask) v per document and head, O(T²), in fp32 (fp64 for fp64 inputs).

    q `[T, Hq, D]`, k and v `[T, Hkv, D]`, `bounds` the document boundaries `[0, ..., T]`; returns `[T, Hq, D]` in
    q's dtype. Query head h reads key/value head h // (Hq // Hkv).
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        q_doc = q[start:end].to(compute)
        k_doc, v_doc = (x[start:end].to(compute).repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q_doc, k_doc) * softmax_scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        probs = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", probs, v_doc))
    return torch.cat(outputs).to(q.dtype)
