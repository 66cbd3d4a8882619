"""Parameters and FLOPs, dense-equivalent and executed, exact from document lengths; plain arithmetic, microseconds a call.

A multiply-add counts 2 FLOPs. Training counts 3 forward passes (the backward pass is two more); recomputation is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.layers import LayerAttention
from configs.schema import ModelConfig

FULL = LayerAttention(kind="full")


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters."""

    embedding: int
    """The embedding matrix, which is the head too where the two are tied."""
    head: int
    """The head's own matrix; 0 where it is tied."""
    non_embedding: int
    """All layers and the final norm: the size that scaling laws go by."""
    matmul: int
    """Entries of the matrices that every token is multiplied with: the layers' and the head's, not the embedding lookup."""
    key_conv: int
    """Entries of the key convolutions, each of which multiplies every token's key once."""

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts of a model, without building it."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.ffn_size)
    biases = (q_size + 2 * kv_size) * config.qkv_bias
    norms = 2 * config.hidden_size + 2 * config.head_dim * config.qk_norm
    key_conv = config.num_layers * config.key_conv * kv_size
    embedding = config.vocab_size * config.hidden_size
    return ParameterCounts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        non_embedding=config.num_layers * (matrices + biases + norms) + key_conv + config.hidden_size,
        matmul=config.num_layers * matrices + embedding,
        key_conv=key_conv,
    )


def attention_pairs(attention: LayerAttention, lengths: Sequence[int]) -> int:
    """(query, key) pairs of one head of one layer over documents of `lengths` tokens.

    Full: Σ L(L+1)/2. Sliding: Σ over queries of min(position + 1, window). MoBA, with n = L // B whole blocks and r = L mod B:
    own blocks n·B(B+1)/2 + r(r+1)/2, past blocks B · Σ over queries of min(own block's index, topk-1), since only a document's
    last block can be short.
    """
    length = np.asarray(lengths, dtype=np.int64)
    if attention.kind == "full":
        return int((length * (length + 1) // 2).sum())
    if attention.kind == "sliding":
        rising = np.minimum(length, attention.window)
        return int((rising * (rising + 1) // 2 + (length - rising) * attention.window).sum())
    size, past = attention.block_size, attention.topk - 1
    whole, rest = np.divmod(length, size)
    own = whole * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    # Σ_{b < whole} min(b, past): a triangle up to `past`, then a plateau.
    rising = np.minimum(whole, past + 1)
    chosen = rising * (rising - 1) // 2 + np.maximum(whole - past - 1, 0) * past
    return int((own + size * (size * chosen + rest * np.minimum(whole, past))).sum())


def gate_pairs(attention: LayerAttention, lengths: Sequence[int]) -> int:
    """(query, past block) scores of one head of one MoBA layer: Σ over queries of the own block's index.

    0 for full and sliding layers, for topk = 1, and for documents of at most topk · block_size tokens: there is no choice to make.
    """
    if attention.kind != "moba" or attention.topk == 1:
        return 0
    length = np.asarray(lengths, dtype=np.int64)
    length = length[length > attention.topk * attention.block_size]
    whole, rest = np.divmod(length, attention.block_size)
    return int((attention.block_size * (whole * (whole - 1) // 2) + rest * whole).sum())


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """FLOPs of forward and backward over some tokens."""

    dense_equivalent: int
    """With full attention in every layer."""
    executed: int
    """With the attention that the layers have."""


def training_flops(config: ModelConfig, attention: Sequence[LayerAttention], lengths: Sequence[int]) -> TrainingFlops:
    """FLOPs of training on documents (pieces, as packed) of `lengths` tokens, with the `attention` of each layer.

    6 · (matmul + key convolution) parameters per token
    + per layer and query head: 12 · head_dim per (query, key) pair (q·k and p·v, 2 · head_dim each, three passes)
    + per MoBA layer: 2 · head_dim · num_heads per gate score and num_kv_heads · head_dim per token for the block means,
      forward only, because no gradient flows through the choice.
    Softmax, norms, RoPE and activations are not counted.
    """
    tokens = int(np.sum(lengths, dtype=np.int64))
    counts = parameter_counts(config)
    per_parameter = 6 * (counts.matmul + counts.key_conv) * tokens
    per_pair = 12 * config.num_heads * config.head_dim
    executed = per_parameter
    for kind in set(attention):
        gate = gate_pairs(kind, lengths)
        means = config.num_kv_heads * config.head_dim * tokens if gate else 0
        layer = per_pair * attention_pairs(kind, lengths) + 2 * config.num_heads * config.head_dim * gate + means
        executed += layer * list(attention).count(kind)
    dense = per_parameter + config.num_layers * per_pair * attention_pairs(FULL, lengths)
    return TrainingFlops(dense_equivalent=dense, executed=executed)


def flops_per_token(config: ModelConfig, attention: Sequence[LayerAttention], lengths: Sequence[int]) -> tuple[float, float]:
    """(dense-equivalent, executed) training FLOPs per token, the mean over documents of `lengths`."""
    flops, tokens = training_flops(config, attention, lengths), int(np.sum(lengths, dtype=np.int64))
    return flops.dense_equivalent / tokens, flops.executed / tokens


def exchange_bytes(config: ModelConfig, activation: str, *, tokens: int, degree: int, itemsize: int) -> int:
    """Bytes that a rank sends to others around one layer's attention, in all passes, for its `tokens` of rows that `degree` share.

    In a pass q, k, v and the output of all heads (`model.sequence_parallel`), of which 1/degree stays; `itemsize` bytes a number. They
    go there in the forward and back in the backward pass, and there once more where the layer's `activation`
    (`configs.layers.ACTIVATIONS`) has anything computed again: `selective` keeps what attention gave, by heads, but not what was exchanged.
    """
    heads = 2 * (config.num_heads + config.num_kv_heads * config.kv_copies(degree))
    passes = 2 if activation == "none" else 3
    return passes * tokens * heads * config.head_dim * itemsize * (degree - 1) // degree
