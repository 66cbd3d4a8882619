"""The SwiGLU feed-forward in tiles of tokens, for rows whose intermediates would not fit.

Shape letters: N tokens, n of a tile, h hidden, f FFN. Gate and up have weights `[f, h]`, down `[h, f]`. Two operators of torch's
dispatcher, so that torch.compile neither unrolls the tiles nor breaks its graph at them.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional

from model.ops.products import add_product

_Weights = tuple[Tensor, ...]
"""Of gate, up and down."""


_unread = ContextVar("_unread", default=False)


@contextlib.contextmanager
def output_unread() -> Iterator[None]:
    """Inside it `tiled_swiglu` gives memory of any content and computes nothing.

    For a layer that is computed again for its backward pass: the feed-forward is its last part, nothing reads what it gave, and its own
    backward pass reads its inputs alone. It saves 3 products of 14.
    """
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def tiled_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, tile: int) -> Tensor:
    """down(silu(gate(x)) · up(x)), `[N, h]` to `[N, h]`, by `tile` tokens: of the `[N, f]` intermediates no more exists at once, in
    either pass.

    The backward pass computes two of the forward pass's three products again: 11 instead of 9 in all. Each weight gets its gradient
    once, summed over tiles in fp32 at least.
    """
    return _forward(x, gate_weight, up_weight, down_weight, tile)


@torch.library.custom_op("swiglu::forward", mutates_args=())
def _forward(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, tile: int) -> Tensor:
    y = torch.empty_like(x)
    if _unread.get():
        return y
    for part, out in zip(x.split(tile), y.split(tile), strict=True):
        gate, up = functional.linear(part, gate_weight), functional.linear(part, up_weight)
        torch.mm(functional.silu(gate).mul_(up), down_weight.t(), out=out)
    return y


@torch.library.custom_op("swiglu::backward", mutates_args=())
def _backward(
    d_y: Tensor, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = gate_weight, up_weight, down_weight
    d_gate_weight, d_up_weight, d_down_weight = totals = tuple(torch.zeros_like(weight, dtype=wide) for weight in weights)
    d_x = torch.empty_like(x)
    for part, d_part, out in zip(x.split(tile), d_y.split(tile), d_x.split(tile), strict=True):
        _add_gradients(part, d_part, weights, out, totals)
    return d_x, d_gate_weight.to(x.dtype), d_up_weight.to(x.dtype), d_down_weight.to(x.dtype)


def _add_gradients(x: Tensor, d_y: Tensor, weights: _Weights, d_x: Tensor, d_weights: _Weights) -> None:
    """Of one tile: writes `d_x` and adds to `d_weights`; x, d_y and d_x `[n, h]`. Holds five `[n, f]` at a time."""
    gate_weight, up_weight, down_weight = weights
    d_gate_weight, d_up_weight, d_down_weight = d_weights
    gate, up = functional.linear(x, gate_weight), functional.linear(x, up_weight)
    activated = functional.silu(gate)
    add_product(d_down_weight, d_y, activated * up)
    d_product = d_y @ down_weight
    d_gate = torch.ops.aten.silu_backward(up.mul_(d_product), gate)
    d_up = d_product.mul_(activated)
    add_product(d_gate_weight, d_gate, x)
    add_product(d_up_weight, d_up, x)
    torch.mm(d_gate, gate_weight, out=d_x).addmm_(d_up, up_weight)


@_forward.register_fake
def _forward_shape(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)


@_backward.register_fake
def _backward_shapes(d_y: Tensor, x: Tensor, *weights_and_tile: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in (x, *weights_and_tile[:-1]))


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.tile = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_y: Tensor):
    return *_backward(d_y, *ctx.saved_tensors, ctx.tile), None


_forward.register_autograd(_differentiate, setup_context=_save)
