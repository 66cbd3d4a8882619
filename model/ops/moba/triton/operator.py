"""The differentiable operator: heads in groups through gate, lists, forward; and back."""

import math
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.moba.triton.backward import moba_backward, output_dot_gradient
from model.ops.moba.triton.forward import moba_forward
from model.ops.moba.triton.gate import block_means, choose_blocks
from model.ops.moba.triton.index import Lists, build_lists
from model.ops.moba.triton.plan import Blocks, block_table, heads_together

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
_MAX_BLOCK, _MAX_TOPK = 32768, 64


def moba_triton(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], block_size: int, topk: int, softmax_scale: float) -> Tensor:
    """As `moba_reference`, for one GPU: q `[T, Hq, D]`, k and v `[T, Hkv, D]`, bf16 or fp16; returns `[T, Hq, D]`.

    Sums, softmax and merging in fp32; two runs are equal to the bit. The lists of who chose what are saved for
    the backward pass; a forward pass that is computed again (activation checkpointing) makes them anew from the same bits.
    Raises ValueError for what the kernels do not take.
    """
    _check(q, block_size, topk)
    q = q if q.stride(-1) == 1 else q.contiguous()
    if k.stride() != v.stride() or k.stride(-1) != 1 or k.stride(1) != k.shape[-1]:  # heads side by side, as projections leave them
        k, v = k.contiguous(), v.contiguous()
    return _TritonMoba.apply(q, k, v, tuple(bounds), block_size, topk, softmax_scale)


def _check(q: Tensor, block_size: int, topk: int) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not q.is_cuda and not interpreted:
        raise ValueError(f"backend='triton': q is on {q.device}; accepted: a CUDA device")
    if q.dtype not in DTYPES and not (interpreted and q.dtype == torch.float32):
        raise ValueError(f"backend='triton': q has dtype {q.dtype}; accepted: torch.bfloat16, torch.float16; backend='torch' takes others")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"backend='triton': q has head dimension {q.shape[-1]}; accepted: 64, 128; backend='torch' takes others")
    if block_size % 64 or not 64 <= block_size <= _MAX_BLOCK:
        raise ValueError(
            f"backend='triton': block_size={block_size}; accepted: multiples of 64 up to {_MAX_BLOCK}; backend='torch' takes others"
        )
    if topk > _MAX_TOPK:
        raise ValueError(f"backend='triton': topk={topk}; accepted: 1 to {_MAX_TOPK}; backend='torch' takes more")


class _TritonMoba(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], block_size: int, topk: int, softmax_scale: float):
        num_tokens, num_heads, head_dim = q.shape
        group = num_heads // k.shape[1]
        blocks = block_table(bounds, block_size, topk - 1, q.device)
        num_past = min(topk - 1, blocks.max_past)
        together = heads_together(num_tokens=num_tokens, num_heads=num_heads, group=group, num_slots=num_past, head_dim=head_dim)
        out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        lse = torch.empty(num_heads, num_tokens, device=q.device, dtype=torch.float32)
        means = block_means(k, blocks) if num_past else None
        saved: list[Tensor] = []
        for first in range(0, num_heads, together):
            heads = range(first, first + together)
            lists = None
            if means is not None:
                lists = build_lists(choose_blocks(q, means, blocks, heads=heads, group=group, num_past=num_past), blocks)
                saved += (lists.entries, lists.offset, lists.count)
            moba_forward(q, k, v, out, lse, blocks=blocks, lists=lists, heads=heads, num_past=num_past, scale=softmax_scale / math.log(2))
        ctx.save_for_backward(q, k, v, out, lse, *saved)
        ctx.blocks, ctx.num_past, ctx.together, ctx.softmax_scale = blocks, num_past, together, softmax_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, out, lse, *saved = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
        delta = output_dot_gradient(out, d_out)
        for number, first in enumerate(range(0, q.shape[1], ctx.together)):
            entries, offset, count = saved[3 * number : 3 * number + 3] or (None, None, None)
            lists = None if entries is None else Lists(entries=entries, offset=offset, count=count)
            moba_backward(
                q, k, v, d_out, lse, delta, dq, dk, dv, blocks=blocks, lists=lists, heads=range(first, first + ctx.together),
                num_past=ctx.num_past, scale=ctx.softmax_scale / math.log(2), softmax_scale=ctx.softmax_scale,
            )  # fmt: skip
        return dq, dk, dv, None, None, None, None
