"""Parts of the decoder beside attention: RMSNorm, the SwiGLU feed-forward, the head and the convolution over keys."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from configs.schema import ModelConfig
from model.ops.loss import linear_cross_entropy
from model.ops.swiglu import tiled_swiglu
from model.sequence_parallel import SequenceParallel


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467); the mean in fp32 whatever x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), `[N, hidden]` to `[N, hidden]` (arXiv 2002.05202, eq. 6); with `tile`, by so many tokens."""

    def __init__(self, config: ModelConfig, tile: int = 0) -> None:
        super().__init__()
        self.tile = tile
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if 0 < self.tile < len(x):
            # The weights themselves: a call of a projection for each tile would gather it anew each time under ZeRO-3.
            return tiled_swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, self.tile)
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Head(nn.Linear):
    """Logits of what the decoder gives, or, where labels are given, their cross-entropies without the logits.

    Both in the module that owns the weight, which ZeRO-3 gathers for the time of its call.
    """

    def __init__(self, config: ModelConfig, loss: str = "auto") -> None:
        """`loss` is one of `model.ops.loss.BACKENDS`."""
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[N, V]` of x `[N, hidden]`, or with labels int64 `[N]` what `linear_cross_entropy` returns."""
        return super().forward(x) if labels is None else linear_cross_entropy(x, self.weight, labels, backend=self.loss)


class KeyConvolution(nn.Module):
    """k'_t = k_t + SiLU(Σ_{l < width} w_l ∘ k_{t-l}) along each document: depthwise, causal (FlashMoBA, arXiv 2511.11571).

    Ours, where the paper (its MoBA layers have no positions) leaves it open: it acts on what k_proj gives, before the norm of
    keys and before RoPE, as short convolutions of keys do elsewhere (Gated DeltaNet, arXiv 2412.06464). Behind RoPE, SiLU would
    make the scores depend on absolute positions. It is in every layer, so that a layer's attention can still change its kind.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.zeros(width, channels))

    def forward(self, k: Tensor, cu_seqlens: Tensor, sequence_parallel: SequenceParallel | None = None) -> Tensor:
        """`[N, channels]` to `[N, channels]` over packed documents with bounds cu_seqlens int32 `[n+1]`, zero before each.

        With `sequence_parallel` k has the channels of this rank's heads alone.
        """
        weight = sequence_parallel.own_channels(self.weight) if sequence_parallel else self.weight
        bounds = cu_seqlens.to(k.device, torch.int64)
        offset = torch.arange(len(k), device=k.device)
        offset = offset - bounds[:-1].repeat_interleave(bounds.diff(), output_size=len(k))
        return k + functional.silu(_CausalSum.apply(k, weight, offset))


class _CausalSum(torch.autograd.Function):
    """Σ_l w_l ∘ k_{t-l} over the tokens before t in its document, fp32 at least; k alone is kept, not its shifted copies.

    k `[N, channels]`, w `[width, channels]`, offset int64 `[N]`: each token's place in its document, from 0.
    """

    @staticmethod
    def forward(ctx, k: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(k, weight, offset)
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        total = wide * weight[0]
        for lag in range(1, min(len(weight), len(k))):
            total[lag:] += (wide[:-lag] * weight[lag]).masked_fill_((offset[lag:] < lag)[:, None], 0)
        return total.to(k.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor):
        k, weight, offset = ctx.saved_tensors
        compute = torch.promote_types(k.dtype, torch.float32)
        wide, d_total = k.to(compute), d_total.to(compute)
        d_k, d_weight = d_total * weight[0], torch.zeros_like(weight, dtype=compute)
        d_weight[0] = (d_total * wide).sum(dim=0)
        for lag in range(1, min(len(weight), len(k))):
            reached = d_total[lag:].masked_fill((offset[lag:] < lag)[:, None], 0)
            d_k[:-lag] += reached * weight[lag]
            d_weight[lag] = (reached * wide[:-lag]).sum(dim=0)
        return d_k.to(k.dtype), d_weight.to(weight.dtype), None
