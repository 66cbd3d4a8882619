"""The public doors of full causal attention: validation, then the chosen backend."""

import torch
from torch import Tensor

from model.ops.checks import check_attention, check_backend, check_decode
from model.ops.full.reference import full_reference
from model.ops.full.sdpa import full_sdpa, sdpa_heads

_IMPLEMENTATIONS = {"reference": full_reference, "sdpa": full_sdpa}
BACKENDS = ("auto", *_IMPLEMENTATIONS)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Full causal attention over packed documents, differentiable in q, k and v.

    Args:
        q: queries `[T, Hq, D]`; float16, bfloat16, float32 or float64.
        k: keys `[T, Hkv, D]` of the same dtype; Hkv divides Hq, and query head h reads key head h // (Hq // Hkv).
        v: values `[T, Hkv, D]`.
        cu_seqlens: int32 `[n_docs+1]`, document boundaries from 0 to T, strictly increasing, on q's device or on the
            CPU (which saves a device synchronisation); None means one document.
        softmax_scale: factor on the scores; None means D ** -0.5.
        backend: one of `BACKENDS`. "reference" is the O(T²) specification, "sdpa" PyTorch's fused kernels; "auto"
            takes "sdpa".

    Returns: `[T, Hq, D]` in q's dtype.
    Raises: ValueError naming the argument, its value and what is accepted.
    """
    check_backend(backend, BACKENDS)
    bounds = check_attention(q, k, v, cu_seqlens, softmax_scale)
    run = _IMPLEMENTATIONS["sdpa" if backend == "auto" else backend]
    with torch.autocast(q.device.type, enabled=False):  # the inputs' dtype decides
        return run(q, k, v, bounds=bounds, softmax_scale=softmax_scale or q.shape[-1] ** -0.5)


def full_decode(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """Full attention of one new token over a key/value cache: the last row of `full_attention` on the document.

    q `[Hq, D]` of the newest token; k and v `[S, Hkv, D]` of all S tokens of its document so far, itself included.
    Returns `[Hq, D]`. Raises ValueError as `full_attention` does. One sequence; batching is the caller's.
    """
    check_decode(q, k, v, softmax_scale)
    with torch.autocast(q.device.type, enabled=False):
        return sdpa_heads(q[None], k, v, is_causal=False, softmax_scale=softmax_scale or q.shape[-1] ** -0.5)[0]
