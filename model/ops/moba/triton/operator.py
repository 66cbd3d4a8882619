"""The differentiable operator: heads in groups, and queries in ranges, through gate, lists, forward; and back.

Two operators of torch's dispatcher, so that torch.compile sees through to their shapes and never into the kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.ops.checks import document_bounds
from model.ops.moba.triton.backward import keys_gradient, output_dot_gradient, queries_gradient
from model.ops.moba.triton.forward import moba_forward
from model.ops.moba.triton.gate import block_means, choose_blocks
from model.ops.moba.triton.index import build_lists, lists_of
from model.ops.moba.triton.launch import aligned, copied, is_aligned
from model.ops.moba.triton.plan import call_of
from model.ops.moba.triton.schedule import Schedule, schedule


def moba_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, block_size: int, topk: int, softmax_scale: float, workspace: int
) -> Tensor:
    """As `moba_reference`, for one GPU: q `[T, Hq, D]`, k and v `[T, Hkv, D]`, bf16 or fp16; returns `[T, Hq, D]`.

    `cu_seqlens` int32 `[n_docs+1]`, best on the CPU; `workspace` bytes are held at once (`schedule`). Sums, softmax
    and merging in fp32; two runs are equal to the bit. The lists of who chose what are saved for the backward pass; a forward
    pass that is computed again (activation checkpointing) makes them anew from the same bits.
    """
    return torch.ops.moba.forward.default(q, k, v, cu_seqlens, block_size, topk, softmax_scale, workspace)[0]


def _inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Keys and values alike, with heads side by side, as projections leave them: the copy engine asks for that. Others are copied.
    if not (is_aligned(k) and is_aligned(v) and k.stride() == v.stride() and k.stride(1) == k.shape[-1]):
        k, v = copied(k), copied(v)
    return aligned(q), k, v


def _schedule(q: Tensor, k: Tensor, cu_seqlens: Tensor, block_size: int, topk: int, workspace: int) -> Schedule:
    sizes = {"num_docs": cu_seqlens.shape[0] - 1, "block_size": block_size, "topk": topk, "workspace": workspace}
    return schedule(tuple(q.shape), k.shape[1], q.element_size(), **sizes)


def _saved_shapes(q: Tensor, cut: Schedule) -> tuple[list[int], list[int]]:
    entries = [cut.num_groups, cut.heads * q.shape[0] * cut.num_slots]
    edges = [cut.num_groups, (cut.num_ranges + 1) * cut.heads * cut.max_blocks]
    return entries, edges


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, block_size: int, topk: int, softmax_scale: float, workspace: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output `[T, Hq, D]`, log-sum-exp `[Hq, T]` (base 2, fp32), and by group of heads the lists' entries and edges (`Lists`)."""
    q, k, v = _inputs(q, k, v)
    bounds = tuple(document_bounds(cu_seqlens, num_tokens=q.shape[0]))
    call = call_of(q, k, bounds, block_size=block_size, topk=topk, softmax_scale=softmax_scale, workspace=workspace)
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(call.num_heads, call.num_tokens, device=q.device, dtype=torch.float32)
    entries, edges = (torch.empty(shape, device=q.device, dtype=torch.int32) for shape in _saved_shapes(q, call.cut))
    means = block_means(call, k) if call.num_past else None
    for heads, group_entries, group_edges in zip(call.groups, entries.unbind(), edges.unbind()):
        if means is not None:
            for first in range(0, len(heads), call.cut.listed):
                part = heads[first : first + call.cut.listed]
                build_lists(call, choose_blocks(call, q, means, part), first, group_entries, group_edges)
        lists = lists_of(call, group_entries, group_edges)
        for r, queries in enumerate(call.ranges):
            moba_forward(call, q, k, v, out, lse, lists and lists.of_range(r), heads, queries)
    return out, lse, entries, edges


def _forward_shapes(q, k, v, cu_seqlens, block_size, topk, softmax_scale, workspace):
    entries, edges = _saved_shapes(q, _schedule(q, k, cu_seqlens, block_size, topk, workspace))
    saved = (q.new_empty(shape, dtype=torch.int32) for shape in (entries, edges))
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32), *saved


def _backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, entries: Tensor, edges: Tensor, d_out: Tensor,
    block_size: int, topk: int, softmax_scale: float, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq `[T, Hq, D]`, dk and dv `[T, Hkv, D]`."""
    q, k, v = _inputs(q, k, v)
    d_out = aligned(d_out)
    out = out if out.is_contiguous() and is_aligned(out) else copied(out)  # what hooks on saved tensors make of it lies anywhere
    bounds = tuple(document_bounds(cu_seqlens, num_tokens=q.shape[0]))
    sizes: dict[str, Any] = {"block_size": block_size, "topk": topk, "softmax_scale": softmax_scale, "workspace": workspace}
    call = call_of(q, k, bounds, **sizes, d_out=d_out)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    delta = output_dot_gradient(call, out, d_out)
    for heads, group_entries, group_edges in zip(call.groups, entries.unbind(), edges.unbind()):
        lists = lists_of(call, group_entries, group_edges)
        slots = None
        if call.keeps_dq:
            slots = torch.empty(len(heads), call.num_tokens, call.num_past, call.head_dim, device=q.device, dtype=q.dtype)
        keys_gradient(call, q, k, v, d_out, lse, delta, dk, dv, slots, lists, heads)
        for r, queries in enumerate(call.ranges):
            queries_gradient(call, q, k, v, d_out, lse, delta, dq, slots, lists and lists.of_range(r), heads, queries)
    return dq, dk, dv


def _backward_shapes(q, k, v, cu_seqlens, out, lse, entries, edges, d_out, block_size, topk, softmax_scale, workspace):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


# By hand rather than by `torch.library.custom_op`, whose wrappers take the host 60 µs of a forward and backward.
_LIBRARY = torch.library.Library("moba", "DEF")


def _register(run: Callable, shapes: Callable) -> None:
    def run_there(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(q):  # kernels are launched on the current device
            return run(q, *args)

    name = run.__name__.removeprefix("_")
    _LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))
    _LIBRARY.impl(name, run_there, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moba::{name}", shapes, lib=_LIBRARY)


class _Attention(torch.autograd.Function):
    """`moba::forward` with its derivative: what `torch.library.register_autograd` would make, less its looks at the schema in each call."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *sizes: int | float):
        with torch._C._AutoDispatchBelowAutograd():
            out, *saved = torch.ops.moba.forward.default(q, k, v, cu_seqlens, *sizes)
        ctx.sizes = sizes
        ctx.save_for_backward(q, k, v, cu_seqlens, out, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient: lists are large
        return out, *saved

    @staticmethod
    def backward(ctx, d_out: Tensor | None, *_: None):
        if d_out is None:
            return (None,) * 8
        q, k, v, cu_seqlens, *saved = ctx.saved_tensors
        return *torch.ops.moba.backward.default(q, k, v, cu_seqlens, *saved, d_out, *ctx.sizes), None, None, None, None, None


def _differentiate_twice(ctx, *_: Tensor):
    raise RuntimeError("moba::backward: backend='triton' has no second derivative; backend='reference' has")


_register(_forward, _forward_shapes)
_register(_backward, _backward_shapes)
_LIBRARY.impl("forward", _Attention.apply, "Autograd")
torch.library.register_autograd("moba::backward", _differentiate_twice, lib=_LIBRARY)
