"""The public doors of full causal attention: validation, then the chosen backend."""

import torch
from torch import Tensor

from model.ops.checks import check_backend, check_decode, check_packed, document_bounds
from model.ops.full import gpu
from model.ops.full.flash import full_flash
from model.ops.full.packed import full_packed
from model.ops.full.reference import full_reference
from model.ops.full.sdpa import full_cudnn, full_sdpa, sdpa_heads

_IMPLEMENTATIONS = {"reference": full_reference, "sdpa": full_sdpa, "cudnn": full_cudnn, "packed": full_packed}
BACKENDS = ("auto", "reference", "sdpa", *gpu.BACKENDS)


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
        backend: one of `BACKENDS`. "reference" is the O(T²) specification, "sdpa" PyTorch's fused kernels, document by
            document; "cudnn" cuDNN's, document by document, and "flash" FlashAttention, all documents at once, both on
            CUDA devices with bfloat16 or float16. "auto" takes the last two where they serve the call, each for the
            documents whose lengths it suits (`packed.CUDNN_LENGTH`), else "sdpa". (A compiled graph reads no
            boundaries: there "auto" takes "flash" for packed documents.)

    Returns: `[T, Hq, D]` in q's dtype.
    Raises: ValueError naming the argument, its value and what is accepted.
    """
    check_backend(backend, BACKENDS)
    check_packed(q, k, v, cu_seqlens, softmax_scale)
    if backend in gpu.BACKENDS and (refused := gpu.refusal(backend, q)):
        raise ValueError(f"backend={backend!r}: {refused}; backend='sdpa' takes others")
    if backend == "auto":
        backend = "sdpa" if gpu.refusal("flash", q) else "packed"
    scale = softmax_scale or q.shape[-1] ** -0.5
    with torch.autocast(q.device.type, enabled=False):  # the inputs' dtype decides
        if backend in ("flash", "packed") and torch.compiler.is_compiling() and cu_seqlens is not None:
            # The operator reads and checks the boundaries: here it would break the graph.
            return full_flash(q, k, v, cu_seqlens, softmax_scale=scale)
        bounds = document_bounds(cu_seqlens, num_tokens=q.shape[0])
        if backend == "flash":
            return full_flash(q, k, v, torch.tensor(bounds, dtype=torch.int32), softmax_scale=scale)
        return _IMPLEMENTATIONS[backend](q, k, v, bounds=bounds, softmax_scale=scale)


def full_decode(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """Full attention of one new token over a key/value cache: the last row of `full_attention` on the document.

    q `[Hq, D]` of the newest token; k and v `[S, Hkv, D]` of all S tokens of its document so far, itself included.
    Returns `[Hq, D]`. Raises ValueError as `full_attention` does. One sequence; batching is the caller's.
    """
    check_decode(q, k, v, softmax_scale)
    with torch.autocast(q.device.type, enabled=False):
        return sdpa_heads(q[None], k, v, is_causal=False, softmax_scale=softmax_scale or q.shape[-1] ** -0.5)[0]
