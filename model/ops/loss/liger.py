"""Liger's fused linear cross-entropy, to measure ours against (linkedin/Liger-Kernel, `ops/fused_linear_cross_entropy.py`)."""

import torch
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from torch import Tensor


def liger_loss(x: Tensor, weight: Tensor, labels: Tensor, *, ignore: int) -> Tensor:
    """As `linear_cross_entropy`. Its losses of single tokens compute their logits again in the backward pass; the weight's gradient
    is summed in fp32."""
    smoothing = z_loss = 0.0
    return LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, labels, None, None, ignore, z_loss, smoothing, "none", None, False, torch.float32
    )[0]
