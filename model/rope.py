"""Rotary positions (Su et al., RoFormer, arXiv 2104.09864), with the pairs of Hugging Face's Llama: (i, i + D/2)."""

import torch
from torch import Tensor

from configs.schema import RopeConfig


def rotary_table(positions: Tensor, head_dim: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle m · theta^(-2i/D), fp32 `[N, 1, D/2]` each, for positions m int64 `[N]` (tokens).

    Computed for each forward pass: nothing is cached, so a change of `rope` between two steps needs no other change.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / rope.theta ** (pair / head_dim)
    angle = positions[:, None, None].to(torch.float32) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of x `[N, heads, D]` by its position's angle, in fp32 at least; x's dtype again."""
    cos, sin = table  # fp32, so bf16 inputs are promoted: products in bf16 would blur neighbouring positions
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
