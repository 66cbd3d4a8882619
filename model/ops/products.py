"""A matrix product that is summed over tiles."""

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total `[A, B]` += aᵀ b of a `[n, A]` and b `[n, B]`, which have one dtype; in total's dtype, which is theirs or fp32."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))
