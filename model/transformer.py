"""The decoder: a Llama-family transformer over packed documents, whose attention is chosen per layer.

Shape letters: N packed tokens, V vocabulary. All inputs of a call lie on the model's device (cu_seqlens may be on the CPU).
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from configs.layers import LayerAttention
from configs.schema import ModelConfig, RopeConfig
from model.attention import Attention, check_kinds
from model.cache import LayerCache
from model.layers import FeedForward, RMSNorm
from model.rope import rotary_table

IGNORE = -100
# Logits held at once while the loss is taken, in elements (1 GiB in fp32): 128K tokens x 128K words would be 64 GiB.
LOGITS_BUDGET = 1 << 28


class Block(nn.Module):
    """One pre-norm decoder layer on the residual stream `[N, hidden]`; arguments as in `Attention.forward`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, *attention_args: object) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *attention_args)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Its state_dict holds parameters only, the same for every attention and every RoPE setting."""

    def __init__(
        self,
        config: ModelConfig,
        attention: tuple[LayerAttention, ...],
        rope: RopeConfig,
        backend: str = "auto",
        workspace: int = 1 << 30,
    ) -> None:
        """`attention` as from `AttentionConfig.per_layer`; `backend` one of `model.attention.BACKENDS`; `workspace` the bytes
        that `moba_attention` may hold of partial results. Raises ValueError.

        Weights are PyTorch's defaults until `model.init.initialise` or `load_state_dict`.
        """
        super().__init__()
        self.config = config
        self.backend = backend
        self.workspace = workspace
        self.set_attention(attention)
        self.set_rope(rope)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def set_attention(self, per_layer: tuple[LayerAttention, ...]) -> None:
        """Switch the attention of every layer, between any two steps; nothing else changes. Raises ValueError."""
        if len(per_layer) != self.config.num_layers:
            raise ValueError(f"attention names {len(per_layer)} layers; the model has num_layers={self.config.num_layers}")
        check_kinds(per_layer, self.backend)
        self.attention = tuple(per_layer)

    def set_rope(self, rope: RopeConfig) -> None:
        """Switch the rotary positions, between any two steps; nothing else changes. Raises ValueError."""
        self.nope_layers = rope.nope_layers(self.config.num_layers)
        self.rope = rope

    @contextlib.contextmanager
    def observed(self, observe: Callable[[int, Tensor, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Inside it `observe(layer, q, k, v, cu_seqlens)` sees what each layer attends with, as `model.attention.Observer`, and
        keeps of it what it will: the model keeps nothing. What it raises ends the forward pass."""
        attentions = [cast(Attention, layer.attention) for layer in self.layers]
        try:
            for index, attention in enumerate(attentions):
                attention.observer = partial(observe, index)
            yield
        finally:
            for attention in attentions:
                attention.observer = None

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or the loss of each token where `labels` are given.

        Args:
            tokens: int64 `[N]`, documents one after the other.
            positions: int64 `[N]`, counted from 0 in each document.
            cu_seqlens: int32 `[n_docs+1]`, document bounds from 0 to N.
            labels: int64 `[N]`, the token that each one must predict; -100 where there is none.

        Returns: logits `[N, V]` in the model's dtype, or cross-entropies fp32 `[N]` in nats, 0 where the label is -100.
        """
        x = self.hidden(tokens, positions, cu_seqlens)
        return self.head(x) if labels is None else self._losses(x, labels)

    def hidden(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, caches: list[LayerCache] | None = None) -> Tensor:
        """What the head reads, `[N, hidden]`; with `caches`, one for each layer, of one sequence (see `Attention.forward`)."""
        x = self.embedding(tokens)
        table = rotary_table(positions, self.config.head_dim, self.rope)
        for index, layer in enumerate(self.layers):
            cache = caches[index] if caches else None
            turn = None if index in self.nope_layers else table
            x = layer(x, turn, cu_seqlens, self.attention[index], self.backend, self.workspace, cache)
        return self.final_norm(x)

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """fp32 `[N]`; in pieces, whose logits the backward pass computes again, where all logits would not fit."""
        size = max(1, LOGITS_BUDGET // self.config.vocab_size)
        if len(x) <= size:
            return self._piece_losses(x, labels)
        pieces = zip(x.split(size), labels.split(size), strict=True)
        return torch.cat([checkpoint(self._piece_losses, *piece, use_reentrant=False) for piece in pieces])

    def _piece_losses(self, x: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(x).float(), labels, ignore_index=IGNORE, reduction="none")
