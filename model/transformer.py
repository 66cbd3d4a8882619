"""The decoder: a Llama-family transformer over packed documents, whose attention is chosen per layer.

Shape letters: N packed tokens, V vocabulary. All inputs of a call lie on the model's device (cu_seqlens may be on the CPU).
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from torch import Tensor, nn

from configs.layers import ACTIVATIONS, LayerAttention
from configs.schema import ModelConfig, RopeConfig
from model.activations import run_layer
from model.attention import Attention, check_kinds
from model.cache import LayerCache
from model.host_memory import HostMemory
from model.layers import FeedForward, Head, RMSNorm
from model.rope import rotary_table
from model.sequence_parallel import SequenceParallel


class Block(nn.Module):
    """One pre-norm decoder layer on the residual stream `[N, hidden]`; arguments as in `Attention.forward`."""

    def __init__(self, config: ModelConfig, ffn_tile: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = FeedForward(config, ffn_tile)

    def forward(self, x: Tensor, *attention_args: object) -> Tensor:
        return self.finish(x, self.attention(self.attention_norm(x), *attention_args))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output `[N, hidden]` from its input and what attention gives."""
        x = x + attended
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
        *,
        loss: str = "auto",
        ffn_tile: int = 0,
    ) -> None:
        """`attention` as from `AttentionConfig.per_layer`; `backend` one of `model.attention.BACKENDS`; `workspace` the bytes
        that `moba_attention` may hold of partial results; `loss` one of `model.ops.loss.BACKENDS`; `ffn_tile` the tokens that the
        feed-forward takes at once, 0 for all. Raises ValueError.

        Weights are PyTorch's defaults until `model.init.initialise` or `load_state_dict`.
        """
        super().__init__()
        self.config = config
        self.backend = backend
        self.workspace = workspace
        self.sequence_parallel: SequenceParallel | None = None
        self.set_attention(attention)
        self.set_rope(rope)
        self.set_activation(("none",) * config.num_layers)
        self.host = HostMemory()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, ffn_tile) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config, loss)
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

    def set_activation(self, per_layer: tuple[str, ...]) -> None:
        """Switch what layers keep for the backward pass, as from `ActivationConfig.per_layer`, between any two steps; no result
        changes. Raises ValueError."""
        if len(per_layer) != self.config.num_layers:
            raise ValueError(f"activation names {len(per_layer)} layers; the model has num_layers={self.config.num_layers}")
        for kept in per_layer:
            if kept not in ACTIVATIONS:
                raise ValueError(f"activation={kept!r}; accepted: {', '.join(ACTIVATIONS)}")
        self.activation = tuple(per_layer)

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

        Returns: logits `[N, V]` in the model's dtype, or cross-entropies fp32 `[N]` in nats, 0 where the label is -100; with
        `sequence_parallel` those of this rank's stretch of the tokens alone.
        """
        if self.sequence_parallel and labels is not None:
            labels = self.sequence_parallel.own_tokens(labels)
        x = self.hidden(tokens, positions, cu_seqlens)
        return self.head(x, labels)

    def hidden(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, caches: list[LayerCache] | None = None) -> Tensor:
        """What the head reads, `[N, hidden]`; with `caches`, one for each layer, of one sequence (see `Attention.forward`).

        With `sequence_parallel` it is that of this rank's stretch of the tokens.
        """
        x = self.embedding(self.sequence_parallel.own_tokens(tokens) if self.sequence_parallel else tokens)
        table = rotary_table(positions, self.config.head_dim, self.rope)
        for index, layer in enumerate(self.layers):
            cache = caches[index] if caches else None
            turn = None if index in self.nope_layers else table
            arguments = (turn, cu_seqlens, self.attention[index], self.backend, self.workspace, cache, self.sequence_parallel)
            x = run_layer(layer, self.activation[index], self.host, x, *arguments)
        self.host.settle()
        return self.final_norm(x)
