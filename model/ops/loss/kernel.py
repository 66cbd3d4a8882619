"""The same in one Triton kernel: a program a row, which is read twice (the second time mostly from the cache) and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16  # 16 elements a thread: two vectors of bf16
_LOW = tl.constexpr(-3.0e38)  # below any logit, and finite, so that no lane subtracts infinity from itself


@triton.jit
def _rows_kernel(
    LOGITS, LABELS, LOSSES, num_columns, IGNORE: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    logits = LOGITS + row.to(tl.int64) * num_columns
    label = tl.load(LABELS + row)
    column = tl.arange(0, BLOCK)
    if label == IGNORE:
        tl.store(LOSSES + row, 0.0)
        if GRADIENTS:
            for first in range(0, num_columns, BLOCK):
                tl.store(logits + first + column, 0.0, mask=first + column < num_columns)
    else:
        highest, total = tl.full((BLOCK,), _LOW, tl.float32), tl.zeros((BLOCK,), tl.float32)  # of each lane, as far as it has come
        for first in range(0, num_columns, BLOCK):
            z = tl.load(logits + first + column, mask=first + column < num_columns, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, z)
            total = total * tl.exp(highest - higher) + tl.exp(z - higher)
            highest = higher
        top = tl.max(highest)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top)))
        tl.store(LOSSES + row, log_sum - tl.load(logits + label).to(tl.float32))
        if GRADIENTS:
            for first in range(0, num_columns, BLOCK):
                inside = first + column < num_columns
                z = tl.load(logits + first + column, mask=inside, other=0.0).to(tl.float32)
                gradient = tl.exp(z - log_sum) - tl.where(first + column == label, 1.0, 0.0)
                tl.store(logits + first + column, gradient.to(LOGITS.dtype.element_ty), mask=inside)


def triton_rows(logits: Tensor, labels: Tensor, *, ignore: int, gradients: bool) -> Tensor:
    """As `torch_rows`, of contiguous logits in fp32, bf16 or fp16 on one GPU; computed in fp32, nothing of their size is made."""
    num_rows, num_columns = logits.shape
    losses = logits.new_empty(num_rows, dtype=torch.float32)
    block = min(_BLOCK, triton.next_power_of_2(num_columns))
    constants = {"IGNORE": ignore, "GRADIENTS": gradients, "BLOCK": block}
    with torch.cuda.device_of(logits):  # kernels are launched on the current device
        _rows_kernel[(num_rows,)](logits, labels, losses, num_columns, **constants, num_warps=_WARPS)
    return losses
