"""The public door of MoBA attention: validation, the hand-over to full attention, then the chosen backend."""

import itertools
from typing import Any

import torch
from torch import Tensor

from model.ops.checks import check_backend, check_packed, check_positive_int, document_bounds
from model.ops.full import full_attention
from model.ops.moba.blocked import moba_blocked
from model.ops.moba.reference import moba_reference
from model.ops.moba.triton.limits import refusal

_IMPLEMENTATIONS = {"reference": moba_reference, "torch": moba_blocked}
BACKENDS = ("auto", "reference", "torch", "triton")


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
    workspace: int = 1 << 30,
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
            linear in T, "triton" on CUDA devices with bfloat16 or float16; "auto" takes "triton" on a CUDA device where it
            serves the call, else "torch". Except in "reference", a call whose longest document has at most
            topk * block_size tokens goes to full attention: the same function, cheaper. (A compiled graph reads no
            boundaries, so there T counts for the longest document.)
        workspace: bytes that "triton" may hold beyond inputs, output, gradients and saved lists, of partial results or of what sorts the
            choices; README.md says what of that has a least size.

    Returns: `[T, Hq, D]` in q's dtype.
    Raises: ValueError naming the argument, its value and what is accepted.
    """
    check_backend(backend, BACKENDS)
    check_positive_int(block_size=block_size, topk=topk, workspace=workspace)
    check_packed(q, k, v, cu_seqlens, softmax_scale)
    num_docs = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    refused = refusal(q, k, num_docs=num_docs, block_size=block_size, topk=topk)
    if backend == "auto":
        backend = "torch" if refused or not q.is_cuda else "triton"
    if backend == "triton" and refused:
        raise ValueError(f"backend='triton': {refused}; backend='torch' takes others")
    num_tokens, is_one_document = q.shape[0], cu_seqlens is None
    if backend == "triton" and torch.compiler.is_compiling() and cu_seqlens is not None:
        longest = num_tokens  # the operator reads and checks the boundaries: here it would break the graph
    else:
        bounds = document_bounds(cu_seqlens, num_tokens=num_tokens)
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    if backend != "reference" and topk * block_size >= longest:
        return full_attention(q, k, v, cu_seqlens=None if is_one_document else cu_seqlens, softmax_scale=softmax_scale)
    sizes: dict[str, Any] = {"block_size": block_size, "topk": topk, "softmax_scale": softmax_scale or q.shape[-1] ** -0.5}
    if backend == "triton":
        from model.ops.moba.triton.operator import moba_triton  # Triton may be missing where its kernels are not used

        return moba_triton(q, k, v, cu_seqlens, workspace=workspace, **sizes)  # kernels, for which autocast does not exist
    with torch.autocast(q.device.type, enabled=False):  # the inputs' dtype decides, and the gate needs fp32
        return _IMPLEMENTATIONS[backend](q, k, v, bounds=bounds, **sizes)
