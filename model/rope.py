"""Rotary positions (Su et al., RoFormer, arXiv 2104.09864), with the pairs of Hugging Face's Llama: (i, i + D/2)."""

import math

import torch
from torch import Tensor

from configs.schema import RopeConfig, RopeScaling


def rotary_table(positions: Tensor, head_dim: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle m · frequency_i, fp32 `[N, 1, D/2]` each, for positions m int64 `[N]` (tokens).

    Both are multiplied by yarn's attention factor: that on q and k together is its temperature of the softmax.
    Computed for each forward pass: nothing is cached, so a change of `rope` between two steps needs no other change.
    """
    angle = positions[:, None, None].to(torch.float32) * frequencies(head_dim, rope).to(positions.device)
    factor = attention_factor(rope)
    return angle.cos() * factor, angle.sin() * factor


def frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """Radians per token of each pair i, fp32 `[D/2]` on the CPU; unscaled f_i = theta^(-2i/D). With s = `factor`:

    linear: f_i / s (position interpolation, Chen et al., arXiv 2306.15595).
    ntk: theta becomes theta · s^(D/(D-2)), so that the slowest pair is divided by s and the fastest by 1 (NTK-aware,
        bloc97 2023, in arXiv 2309.00071). Fixed: it does not depend on the length of the sequence, as "dynamic" forms do.
    yarn: w_i f_i + (1 - w_i) f_i / s, where w falls from 1 to 0 in equal steps from the pair that makes beta_fast turns over
        the original length to the one that makes beta_slow (Peng et al., arXiv 2309.00071, in the released form).
    llama3: the same blend, where w falls with the number of turns, from high_freq_factor to low_freq_factor (Llama 3.1).
    The last two are divided by `interpolation` besides.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32)
    theta = rope.theta * rope.factor ** (head_dim / max(head_dim - 2, 1)) if rope.scaling is RopeScaling.NTK else rope.theta
    frequency = 1.0 / theta ** (pair / head_dim)
    if rope.scaling is RopeScaling.LINEAR:
        return frequency / rope.factor
    if rope.scaling is RopeScaling.YARN:
        kept = _yarn_kept(head_dim, rope)
    elif rope.scaling is RopeScaling.LLAMA3:
        turns = rope.original_max_seq_len * frequency / (2 * math.pi)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    else:
        return frequency
    return (frequency * kept + frequency / rope.factor * (1 - kept)) / rope.interpolation


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1, or for yarn the given factor, else 0.1 ln(s) + 1 (arXiv 2309.00071)."""
    if rope.scaling is not RopeScaling.YARN:
        return 1.0
    return rope.attention_factor or 0.1 * math.log(rope.factor) + 1.0


def _yarn_kept(head_dim: int, rope: RopeConfig) -> Tensor:
    """Share w of each pair's own frequency, from 1 down to 0, fp32 `[D/2]`."""

    def pair_with(turns: float) -> float:  # f_i · length = 2π · turns, solved for i
        return head_dim * math.log(rope.original_max_seq_len / (2 * math.pi * turns)) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_with(rope.beta_fast)), 0)
    last = min(math.ceil(pair_with(rope.beta_slow)), head_dim - 1)
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)).clamp(0, 1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of x `[N, heads, D]` by its position's angle, in fp32 at least; x's dtype again."""
    cos, sin = table  # fp32, so bf16 inputs are promoted: products in bf16 would blur neighbouring positions
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
