"""Full causal attention through FlashAttention: packed documents in one launch (Dao, arXiv 2307.08691).

The kernel is PyTorch's own; `torch.nn.attention.activate_flash_attention_impl("FA3")` puts an installed package's in its place. It is
called by the operators under `torch.nn.attention.varlen`, whose own interface differs between versions of PyTorch. Two custom operators
around them read the boundaries, so that torch.compile need not.
"""

import functools
import itertools

import torch
from torch import Tensor

from model.ops.checks import document_bounds
from model.ops.full.gpu import aligned
from model.ops.graphs import lasting


def full_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, softmax_scale: float) -> Tensor:
    """q `[T, Hq, D]`, k and v `[T, Hkv, D]`, bf16 or fp16, on a CUDA device; `cu_seqlens` int32 `[n_docs+1]`, best on the CPU.

    Returns `[T, Hq, D]`; memory is linear in T, and query heads that share keys and values read one copy. The backward pass adds to the
    queries' gradients in no fixed order, in a fixed one under `torch.use_deterministic_algorithms(True)`.
    """
    return _forward(q, k, v, cu_seqlens, softmax_scale)[0]


@functools.lru_cache(maxsize=32)  # the layers of a model ask for the same, and a copy to the device could not be captured in a CUDA graph
def _on_device(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """The boundaries int32 on the device, and the tokens of the longest document."""
    return torch.tensor(bounds, dtype=torch.int32, device=device), max(end - start for start, end in itertools.pairwise(bounds))


def _bounds(q: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, int]:
    return lasting(_on_device(tuple(document_bounds(cu_seqlens, num_tokens=q.shape[0])), q.device), q.device)


@torch.library.custom_op("full::flash_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, D]` and log-sum-exp `[Hq, T]` in fp32."""
    bounds, longest = _bounds(q, cu_seqlens)
    inputs = (aligned(x) for x in (q, k, v))
    dropout, is_causal, debug = 0.0, True, False
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *inputs, bounds, bounds, longest, longest, dropout, is_causal, debug, scale=softmax_scale
    )
    return out.contiguous(), lse.contiguous()  # as the fake says; they are


@_forward.register_fake
def _(q, k, v, cu_seqlens, softmax_scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("full::flash_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq `[T, Hq, D]`, dk and dv `[T, Hkv, D]`."""
    bounds, longest = _bounds(q, cu_seqlens)
    inputs = (aligned(x) for x in (d_out, q, k, v))
    dropout, is_causal = 0.0, True
    random_state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of dropout
    grads = torch.ops.aten._flash_attention_backward(
        *inputs, out, lse, bounds, bounds, longest, longest, dropout, is_causal, random_state, unused, scale=softmax_scale
    )
    d_q, d_k, d_v = (x.contiguous() for x in grads)
    return d_q, d_k, d_v


@_backward.register_fake
def _(d_out, q, k, v, cu_seqlens, out, lse, softmax_scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp, which has no gradient


def _differentiate(ctx, d_out: Tensor | None, _: None):
    if d_out is None:
        return (None,) * 5
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    return *_backward(d_out, q, k, v, cu_seqlens, out, lse, ctx.softmax_scale), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
