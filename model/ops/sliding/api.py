"""The public door of sliding-window attention: validation, the hand-over to full attention, then the chosen backend."""

import itertools

import torch
from torch import Tensor

from model.ops.checks import check_attention, check_backend, check_positive_int
from model.ops.full import full_attention
from model.ops.sliding.chunked import sliding_chunked
from model.ops.sliding.reference import sliding_reference
from model.ops.sliding.varlen import refusal, sliding_varlen

_IMPLEMENTATIONS = {"reference": sliding_reference, "torch": sliding_chunked, "varlen": sliding_varlen}
BACKENDS = ("auto", *_IMPLEMENTATIONS)


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention over packed documents in which each query sees the last `window` tokens of its document.

    Differentiable in q, k and v. The query's own token is one of the `window`.

    Args:
        q: queries `[T, Hq, D]`; float16, bfloat16, float32 or float64.
        k: keys `[T, Hkv, D]` of the same dtype; Hkv divides Hq, and query head h reads key head h // (Hq // Hkv).
        v: values `[T, Hkv, D]`.
        window: tokens that a query sees at most, its own included; at least 1 (its own alone).
        cu_seqlens: int32 `[n_docs+1]`, document boundaries from 0 to T, strictly increasing, on q's device or on the
            CPU (which saves a device synchronisation); None means one document.
        softmax_scale: factor on the scores; None means D ** -0.5.
        backend: one of `BACKENDS`. "reference" is the O(T²) specification, "torch" runs on any device in memory linear in T,
            "varlen" is PyTorch's FlashAttention on CUDA devices with bfloat16 or float16; "auto" takes "varlen" where it
            serves the call, else "torch". Except in "reference", a call whose longest document has at most `window` tokens
            goes to full attention: the same function, cheaper.

    Returns: `[T, Hq, D]` in q's dtype.
    Raises: ValueError naming the argument, its value and what is accepted.
    """
    check_backend(backend, BACKENDS)
    check_positive_int(window=window)
    bounds = check_attention(q, k, v, cu_seqlens, softmax_scale)
    refused = refusal(q)
    if backend == "auto":
        backend = "torch" if refused else "varlen"
    if backend == "varlen" and refused:
        raise ValueError(f"backend='varlen': {refused}; backend='torch' takes others")
    if backend != "reference" and window >= max(end - start for start, end in itertools.pairwise(bounds)):
        as_given = None if cu_seqlens is None else torch.tensor(bounds, dtype=torch.int32)
        return full_attention(q, k, v, cu_seqlens=as_given, softmax_scale=softmax_scale)
    with torch.autocast(q.device.type, enabled=False):  # the inputs' dtype decides
        return _IMPLEMENTATIONS[backend](q, k, v, bounds=bounds, window=window, softmax_scale=softmax_scale or q.shape[-1] ** -0.5)
