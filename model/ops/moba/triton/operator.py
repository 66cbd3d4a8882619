"""The differentiable operator: heads in groups, and queries in ranges, through gate, lists, forward; and back.

Two operators of torch's dispatcher, so that torch.compile sees through to their shapes and never into the kernels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.ops.checks import document_bounds
from model.ops.moba.triton.backward import keys_gradient, output_dot_gradient, queries_gradient
from model.ops.moba.triton.forward import moba_forward
from model.ops.moba.triton.gate import block_means, choose_blocks
from model.ops.moba.triton.index import Lists, build_lists
from model.ops.moba.triton.plan import Schedule, block_table, schedule


def moba_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, block_size: int, topk: int, softmax_scale: float, workspace: int
) -> Tensor:
    """As `moba_reference`, for one GPU: q `[T, Hq, D]`, k and v `[T, Hkv, D]`, bf16 or fp16; returns `[T, Hq, D]`.

    `cu_seqlens` int32 `[n_docs+1]`, best on the CPU; `workspace` bytes of partial results are held at once. Sums, softmax
    and merging in fp32; two runs are equal to the bit. The lists of who chose what are saved for the backward pass; a forward
    pass that is computed again (activation checkpointing) makes them anew from the same bits.
    """
    return torch.ops.moba.forward(q, k, v, cu_seqlens, block_size, topk, softmax_scale, workspace)[0]


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Keys with heads side by side, as projections leave them, and rows on 16 bytes, which the copy engine asks for: others are copied.
    as_is = k.stride() == v.stride() and k.stride()[1:] == (k.shape[-1], 1) and k.stride(0) * k.element_size() % 16 == 0
    aligned = k.data_ptr() % 16 == v.data_ptr() % 16 == 0
    if not (as_is and aligned):
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))  # contiguous() would leave a dense one where it lies
    return _dense_rows(q), k, v


def _schedule(q: Tensor, k: Tensor, cu_seqlens: Tensor, block_size: int, topk: int, workspace: int) -> Schedule:
    sizes = {"num_docs": cu_seqlens.shape[0] - 1, "block_size": block_size, "topk": topk, "workspace": workspace}
    return schedule(tuple(q.shape), k.shape[1], q.element_size(), **sizes)


def _bounds(q: Tensor, cu_seqlens: Tensor) -> tuple[int, ...]:
    return tuple(document_bounds(cu_seqlens, num_tokens=q.shape[0], device=q.device))


def _ranges(cut: Schedule, num_tokens: int) -> list[range]:
    return [range(first, min(first + cut.tokens, num_tokens)) for first in range(0, num_tokens, cut.tokens)]


def _saved_shapes(q: Tensor, cut: Schedule) -> tuple[list[int], list[int]]:
    entries = [cut.num_groups, cut.heads * q.shape[0] * cut.num_slots]
    edges = [cut.num_groups, (cut.num_ranges + 1) * cut.heads * cut.max_blocks]
    return entries, edges


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, block_size: int, topk: int, softmax_scale: float, workspace: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output `[T, Hq, D]`, log-sum-exp `[Hq, T]` (base 2, fp32), and by group of heads the lists' entries and edges (`Lists`)."""
    q, k, v = _inputs(q, k, v)
    num_tokens, num_heads, _ = q.shape
    cut = _schedule(q, k, cu_seqlens, block_size, topk, workspace)
    blocks = block_table(_bounds(q, cu_seqlens), block_size, cut.num_slots, q.device)
    num_past = min(cut.num_slots, blocks.max_past)
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(num_heads, num_tokens, device=q.device, dtype=torch.float32)
    entries, edges = (torch.empty(shape, device=q.device, dtype=torch.int32) for shape in _saved_shapes(q, cut))
    means = block_means(k, blocks) if num_past else None
    for g in range(cut.num_groups):
        heads = range(g * cut.heads, (g + 1) * cut.heads)
        lists = None
        if means is not None:
            chosen = choose_blocks(q, means, blocks, heads=heads, group=num_heads // k.shape[1], num_past=num_past)
            lists = build_lists(chosen, blocks, cut, entries[g], edges[g])
            del chosen
        for r, queries in enumerate(_ranges(cut, num_tokens)):
            part = lists and lists.of_range(r, cut.heads * len(queries) * num_past)
            sizes: dict[str, Any] = {"blocks": blocks, "heads": heads, "queries": queries, "num_past": num_past}
            moba_forward(q, k, v, out, lse, lists=part, scale=softmax_scale / math.log(2), **sizes)
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
    num_tokens = len(q)
    cut = _schedule(q, k, cu_seqlens, block_size, topk, workspace)
    blocks = block_table(_bounds(q, cu_seqlens), block_size, cut.num_slots, q.device)
    num_past = min(cut.num_slots, blocks.max_past)
    d_out = _dense_rows(d_out)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    delta = output_dot_gradient(out, d_out)
    scales = {"scale": softmax_scale / math.log(2), "softmax_scale": softmax_scale}
    for g in range(cut.num_groups):
        heads = range(g * cut.heads, (g + 1) * cut.heads)
        sizes: dict[str, Any] = {"blocks": blocks, "heads": heads, "num_past": num_past, **scales}
        lists = slots = None
        if num_past:
            num_lists = cut.heads * blocks.count
            rows = edges[g, : (cut.num_ranges + 1) * num_lists].view(cut.num_ranges + 1, num_lists)
            lists = Lists(entries=entries[g], edges=rows, num_entries=cut.heads * blocks.num_pairs[num_past])
            if block_size <= 128 and cut.num_ranges == 1:  # all of a block's keys in one tile: dQ's part of it is whole
                slots = q.new_empty(cut.heads, num_tokens, num_past, q.shape[-1])
        keys_gradient(q, k, v, d_out, lse, delta, dk, dv, slots, lists=lists, num_ranges=cut.num_ranges, **sizes)
        for r, queries in enumerate(_ranges(cut, num_tokens)):
            part = lists and lists.of_range(r, cut.heads * len(queries) * num_past)
            queries_gradient(q, k, v, d_out, lse, delta, dq, slots, lists=part, queries=queries, **sizes)
    return dq, dk, dv


def _backward_shapes(q, k, v, cu_seqlens, out, lse, entries, edges, d_out, block_size, topk, softmax_scale, workspace):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, d_out: Tensor, *_: Tensor):
    q, k, v, cu_seqlens, *saved = ctx.saved_tensors
    return *torch.ops.moba.backward(q, k, v, cu_seqlens, *saved, d_out, *ctx.arguments), None, None, None, None, None


def _differentiate_twice(ctx, *_: Tensor):
    raise RuntimeError("moba::backward: backend='triton' has no second derivative; backend='reference' has")


# By hand rather than by `torch.library.custom_op`, whose wrappers take the host 60 µs of a forward and backward.
_LIBRARY = torch.library.Library("moba", "DEF")


def _register(run: Callable, shapes: Callable, differentiate: Callable, save: Callable | None = None) -> None:
    name = run.__name__.removeprefix("_")
    _LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moba::{name}", shapes, lib=_LIBRARY)
    torch.library.register_autograd(f"moba::{name}", differentiate, setup_context=save, lib=_LIBRARY)


_register(_forward, _forward_shapes, _differentiate, _save)
_register(_backward, _backward_shapes, _differentiate_twice)
