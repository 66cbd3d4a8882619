"""The loss in tiles of tokens, whose logits are turned into their own gradient before the next tile's take their place.

Shape letters: N tokens, n of a tile, h hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops.products import add_product

# Logits of a tile, in bytes. Large tiles are what keeps the matrix products at their speed: below about 8192 tokens that of the
# hidden states' gradient has too few output tiles for a GPU, and the fp32 sum of the weight's gradient is read and written more often.
LOGITS_BYTES = 1 << 31
_ALIGN = 256  # tokens: rows of the matrix products' own tiles

Rows = Callable[..., Tensor]
"""`torch_rows` or what computes the same."""


def tile_tokens(vocab_size: int, itemsize: int) -> int:
    """Tokens in a tile, for logits of `itemsize` bytes."""
    most = max(1, LOGITS_BYTES // (vocab_size * itemsize))
    return most - most % _ALIGN if most > _ALIGN else most


def tiled_loss(x: Tensor, weight: Tensor, labels: Tensor, *, ignore: int, rows: Rows) -> Tensor:
    """As `linear_cross_entropy`. Where no gradient is asked for, the losses alone are computed."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _TiledLoss.apply(x, weight, labels, ignore, rows)
    return _sweep(x, weight, labels, ignore, rows, gradients=False)[0]


class _TiledLoss(torch.autograd.Function):
    """Takes the gradient along in the forward pass, while a tile's logits are there: three matrix products, none of them twice.

    There it cannot know what the caller does with the losses, and takes their sum. Of `c · losses.sum()` the gradient is then c times
    the one it has. Whatever else may come back for the losses, a weight of its own for each token, costs a second sweep, in which the
    weights go in before tokens are summed up. Autograd tells the two apart by itself: the gradient of a sum is one number, expanded.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, ignore: int, rows: Rows) -> Tensor:
        losses, *ctx.of_sum = _sweep(x, weight, labels, ignore, rows, gradients=True)
        ctx.save_for_backward(x, weight, labels)
        ctx.ignore, ctx.rows = ignore, rows
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses: Tensor):
        x, weight, labels = ctx.saved_tensors
        if d_losses.stride() == (0,) and ctx.of_sum:
            # In place, as a copy of d_x has the size of a checkpoint; by a vector of one, as a number would be rounded to their dtype.
            d_x, d_weight = (gradient.mul_(d_losses[:1]) for gradient in ctx.of_sum)
            ctx.of_sum = []
        else:
            _, d_x, d_weight = _sweep(x, weight, labels, ctx.ignore, ctx.rows, gradients=True, d_losses=d_losses[:, None])
        return d_x, d_weight.to(weight.dtype), None, None, None


def _sweep(
    x: Tensor, weight: Tensor, labels: Tensor, ignore: int, rows: Rows, *, gradients: bool, d_losses: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[N]`, and with `gradients` those of Σ d_losses · losses: of x in its dtype, of weight in fp32 at least, else empty.

    `d_losses` `[N, 1]`; None are ones.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = tile_tokens(len(weight), weight.element_size())
    losses = x.new_empty(len(x), dtype=wide)
    d_x = torch.empty_like(x if gradients else x[:0])
    d_weight = torch.zeros_like(weight if gradients else weight[:0], dtype=wide)
    buffer = x.new_empty(min(size, len(x)), len(weight))
    for first in range(0, len(x), size):
        tile = slice(first, first + size)
        inputs = x[tile]
        logits = torch.mm(inputs, weight.t(), out=buffer[: len(inputs)])
        losses[tile] = rows(logits, labels[tile], ignore=ignore, gradients=gradients)
        if not gradients:
            continue
        torch.mm(logits, weight, out=d_x[tile])  # they are the gradient now
        if d_losses is not None:
            d_x[tile].mul_(d_losses[tile])
            inputs = (inputs * d_losses[tile]).to(x.dtype)
        add_product(d_weight, logits, inputs)
    return losses, d_x, d_weight
