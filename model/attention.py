"""Grouped-query attention of one layer: projections, key convolution, RoPE, then attention as the layer's setting says."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from configs.layers import KINDS, LayerAttention
from configs.schema import ModelConfig
from model.cache import LayerCache
from model.layers import KeyConvolution, RMSNorm
from model.ops import full, moba, sliding
from model.rope import rotate
from model.sequence_parallel import SequenceParallel

Observer = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Called with q `[N, Hq, D]`, k and v `[N, Hkv, D]` as a layer attends with them, and cu_seqlens int32 `[n+1]`."""

BACKENDS = tuple(dict.fromkeys(full.BACKENDS + moba.BACKENDS + sliding.BACKENDS))


class Attention(nn.Module):
    """No state depends on the kind of attention: all kinds use the same parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.observer: Observer | None = None
        """Sees what each forward pass attends with; see `Transformer.observed`."""
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.key_conv = KeyConvolution(kv_size, config.key_conv) if config.key_conv else None
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor,
        attention: LayerAttention,
        backend: str,
        workspace: int,
        cache: LayerCache | None = None,
        sequence_parallel: SequenceParallel | None = None,
    ) -> Tensor:
        """`[N, hidden]` to `[N, hidden]` over packed documents with bounds cu_seqlens int32 `[n+1]`.

        `table` is `rotary_table` of the tokens' positions, None in a layer without positions; `workspace` counts bytes, as in
        `moba_attention`. With a `cache` x is one document's: all of its prompt where the cache is empty, afterwards its next token.
        With `sequence_parallel` x and what is returned are this rank's stretch of the tokens, table and cu_seqlens all of them.
        """
        q, k, v = self.project(x, table, cu_seqlens, cache, sequence_parallel)
        if self.observer is not None:
            self.observer(q, k, v, cu_seqlens)
        if cache is not None:
            cache.append(k, v)
            if cache.length > len(k):
                return self.o_proj(_attend_cached(q.squeeze(0), cache).flatten()[None])
        out = _attend(q, k, v, cu_seqlens, attention, backend, workspace)
        return self.o_proj((sequence_parallel.to_tokens(out) if sequence_parallel else out).flatten(1))

    def project(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor,
        cache: LayerCache | None = None,
        sequence_parallel: SequenceParallel | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` attends with: q `[N, Hq, D]`, k and v `[N, Hkv, D]` of x `[N, hidden]`; arguments as there.

        With `sequence_parallel` of all N tokens those heads that are this rank's. The exchange comes first, as the key convolution
        reads tokens that lie before this rank's stretch.
        """
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if sequence_parallel:
            q, k, v = sequence_parallel.to_heads(q, k, v)
        if self.key_conv is not None:
            raw = k.flatten(1)
            convolved = self.key_conv(raw, cu_seqlens, sequence_parallel) if cache is None else _convolve_cached(self.key_conv, raw, cache)
            k = convolved.view_as(k)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)


def check_kinds(per_layer: tuple[LayerAttention, ...], backend: str) -> None:
    """Raises ValueError for an attention kind or a backend that does not exist."""
    for attention in per_layer:
        if attention.kind not in KINDS:
            raise ValueError(f"attention kind={attention.kind!r}; accepted: {', '.join(KINDS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; accepted: {', '.join(BACKENDS)}")


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, attention: LayerAttention, backend: str, workspace: int) -> Tensor:
    """`[N, Hq, D]` from q `[N, Hq, D]`, k and v `[N, Hkv, D]`. A backend that one kind alone has is `auto` to the other."""
    if attention.kind == "full":
        name = backend if backend in full.BACKENDS else "auto"
        return full.full_attention(q, k, v, cu_seqlens=cu_seqlens, backend=name)
    if attention.kind == "sliding":
        name = backend if backend in sliding.BACKENDS else "auto"
        return sliding.sliding_attention(q, k, v, window=attention.window, cu_seqlens=cu_seqlens, backend=name)
    name = backend if backend in moba.BACKENDS else "auto"
    sizes = {"block_size": attention.block_size, "topk": attention.topk}
    return moba.moba_attention(q, k, v, **sizes, cu_seqlens=cu_seqlens, backend=name, workspace=workspace)


def _convolve_cached(key_conv: KeyConvolution, k: Tensor, cache: LayerCache) -> Tensor:
    """Convolved keys `[n, Hkv * D]` of the next n tokens, from their raw ones; the cache then has the last raw ones."""
    raw = torch.cat([cache.raw_keys, k])
    cache.raw_keys = raw[max(len(raw) - key_conv.width + 1, 0) :].clone()  # a view would keep the whole prompt
    return key_conv(raw, torch.tensor([0, len(raw)], dtype=torch.int32))[-len(k) :]


def _attend_cached(q: Tensor, cache: LayerCache) -> Tensor:
    """`[Hq, D]` of the newest token, from q `[Hq, D]` and a cache that already holds its key and value."""
    attention = cache.attention
    if attention.kind == "moba":
        sizes = {"block_size": attention.block_size, "topk": attention.topk}
        return moba.moba_decode(q, cache.keys, cache.values, cache.block_means, **sizes)
    return full.full_decode(q, cache.keys, cache.values)  # a sliding layer's cache holds what is inside the window
