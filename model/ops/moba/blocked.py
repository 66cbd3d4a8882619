"""The `torch` backend: MoBA on any device in memory linear in T, forward and backward (MoBA paper, algorithm 1).

Its forward pass is one operator of torch's dispatcher, like those of the `triton` backend: activation checkpointing can keep what it
gives, the chosen blocks among it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from model.ops.moba.blocked_backward import moba_backward
from model.ops.moba.blocked_forward import moba_forward
from model.ops.moba.routing import block_layout, block_means, choose_blocks
from model.ops.moba.tiles import build_tiles

# CPU matrix products round by the alignment of their operands. With head dimensions a multiple of this (64 bytes of fp32)
# every tile starts aligned, so that its results do not depend on its place among the tiles.
_ALIGNED_DIM = 16

# Partial results held at once, in elements; key/value heads that would exceed it go one group after another.
WORKSPACE_BUDGET = 1 << 28


def moba_blocked(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], block_size: int, topk: int, softmax_scale: float) -> Tensor:
    """As `moba_reference`, sparse: q `[T, Hq, D]`, k and v `[T, Hkv, D]`; returns `[T, Hq, D]` in q's dtype.

    Accumulates in fp32 (fp64 for fp64 inputs). On the CPU bitwise deterministic, and a later token or another document
    changes no bit of an earlier token's output, nor of a gradient of a loss on earlier tokens.
    """
    head_dim = q.shape[-1]
    if head_dim % _ALIGNED_DIM:
        q, k, v = (pad(x, (0, -head_dim % _ALIGNED_DIM)) for x in (q, k, v))
    layout = block_layout(bounds, block_size)
    num_slots = min(topk, layout.max_doc_blocks)
    kv_heads = max(1, WORKSPACE_BUDGET // (q.numel() // k.shape[1] * num_slots))
    query_heads = kv_heads * (q.shape[1] // k.shape[1])
    outputs = []
    for q_group, k_group, v_group in zip(q.split(query_heads, 1), k.split(kv_heads, 1), v.split(kv_heads, 1)):
        outputs.append(_forward(q_group, k_group, v_group, bounds, block_size, num_slots - 1, softmax_scale)[0])
    return torch.cat(outputs, dim=1)[..., :head_dim]


@torch.library.custom_op("moba::blocked_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], block_size: int, num_past: int, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[T, Hq, D]`, its log-sum-exp, and the chosen blocks int64 `[T, Hq, num_past]`."""
    layout = block_layout(list(bounds), block_size)
    chosen = choose_blocks(q, block_means(k, layout), layout, num_past=num_past)
    tiles = build_tiles(chosen, layout, num_kv_heads=k.shape[1])
    out, lse = moba_forward(q, k, v, layout=layout, tiles=tiles, softmax_scale=softmax_scale)
    return out.to(q.dtype), lse, chosen


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.bounds, ctx.block_size, _, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient: the choices are many


@once_differentiable
def _differentiate(ctx, d_out: Tensor | None, *_: None):
    if d_out is None:
        return (None,) * 7
    q, k, v, out, lse, chosen = ctx.saved_tensors
    # Rebuilt, not saved: the sort is cheap and its tables are the size of the saved tensors together.
    layout = block_layout(list(ctx.bounds), ctx.block_size)
    tiles = build_tiles(chosen, layout, num_kv_heads=k.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        grads = moba_backward(d_out, q, k, v, out, lse, layout=layout, tiles=tiles, softmax_scale=ctx.softmax_scale)
    return *(grad.to(q.dtype) for grad in grads), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
