"""Small models and packed inputs for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor

from configs.schema import AttentionConfig, ModelConfig, RopeConfig
from model.init import initialise
from model.transformer import Transformer

RULES = ("full", "moba(8, 2)", "last 1 full, rest moba(8, 3)")
HYBRIDS = ("sliding(1)", "sliding(7)", "every 2 moba(8, 2), rest sliding(16)", "last 1 full, rest sliding(100)")


def tiny_config(**changes: object) -> ModelConfig:
    """A model of two layers with grouped-query attention; init_std is large so that attention is far from uniform."""
    values = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return ModelConfig(**{**values, "ffn_size": 48, "max_seq_len": 256, "init_std": 0.3, **changes})


def build(
    config: ModelConfig, rule: str = "full", *, theta: float = 10000.0, nope: str = "", seed: int = 0, backend: str = "auto", **ways: Any
) -> Transformer:
    """An initialised model with the attention of `rule`; key convolutions, which start at 0, are drawn so that they matter.

    `ways` of computing the same, such as `ffn_tile`, go to the model.
    """
    attention = AttentionConfig(rule=rule).per_layer(config.num_layers)
    model = Transformer(config, attention, RopeConfig(theta=theta, nope=nope), backend, **ways)
    initialise(model, config, seed)
    for index, layer in enumerate(model.layers):
        if layer.attention.key_conv is not None:
            torch.nn.init.normal_(layer.attention.key_conv.weight, generator=torch.Generator().manual_seed(100 * seed + index))
    return model


def pack(lengths: list[int], vocab_size: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens int64 `[N]`, positions `[N]` and cu_seqlens int32 `[n+1]` of documents of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return tokens, positions, cu_seqlens
