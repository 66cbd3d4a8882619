"""The public door of MoBA attention: validation, the hand-over to full attention, then the chosen backend."""

import itertools

import torch
from torch import Tensor

from model.ops.checks import check_attention, check_backend, check_positive_int
from model.ops.full import full_attention
from model.ops.moba.blocked import moba_blocked
from model.ops.moba.reference import moba_reference

_IMPLEMENTATIONS = {"reference": moba_reference, "torch": moba_blocked}
_AUTO = {"default": "torch"}  # by device type
BACKENDS = ("auto", *_IMPLEMENTATIONS)


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mixture of Block Attention (arXiv 2502.13189, eq. 2-6) over packed documents, differentiable in q, k and v.

    Each query sees its own block causally and, of the blocks wholly before it, the topk-1 with the highest
    <q, mean key>; one softmax over all tokens seen. No gradient flows through the choice.

    Args:
        q: queries `[T, Hq, D]`; float16, bfloat16, float32 or float64.
        k: keys `[T, Hkv, D]` of the same dtype; Hkv divides Hq, and query head h reads key head h // (Hq // Hkv).
        v: values `[T, Hkv, D]`.
        block_size: tokens per block, counted from each document's first token; at least 1.
        topk: blocks seen per query, the own block included; at least 1 (own block only).
        cu_seqlens: int32 `[n_docs+1]`, document boundaries from 0 to T, strictly increasing, on q's device or on the
            CPU (which saves a device synchronisation); None means one document.
        softmax_scale: factor on the scores (not on the gate, which has none); None means D ** -0.5.
        backend: one of `BACKENDS`. "reference" is the O(T²) specification, "torch" runs on any device in memory
            linear in T; "auto" takes "torch". Except in "reference", a call whose longest document has at most
            topk * block_size tokens goes to full attention: the same function, cheaper.

    Returns: `[T, Hq, D]` in q's dtype.
    Raises: ValueError naming the argument, its value and what is accepted.
    """
    check_backend(backend, BACKENDS)
    check_positive_int(block_size=block_size, topk=topk)
    bounds = check_attention(q, k, v, cu_seqlens, softmax_scale)
    if backend == "auto":
        backend = _AUTO.get(q.device.type, _AUTO["default"])
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    if backend != "reference" and topk * block_size >= longest:
        return full_attention(q, k, v, cu_seqlens=cu_seqlens, softmax_scale=softmax_scale)
    scale = softmax_scale or q.shape[-1] ** -0.5
    run = _IMPLEMENTATIONS[backend]
    with torch.autocast(q.device.type, enabled=False):  # the inputs' dtype decides, and the gate needs fp32
        return run(q, k, v, bounds=bounds, block_size=block_size, topk=topk, softmax_scale=scale)
