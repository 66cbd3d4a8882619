"""Parameters against built models, pairs against the routing itself, FLOPs against torch's own counter."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from configs.layers import LayerAttention
from configs.schema import AttentionConfig
from model.accounting import FULL, attention_pairs, flops_per_token, gate_pairs, parameter_counts, training_flops
from model.ops.moba import select_blocks
from tests.model.helpers import build, pack, tiny_config


def moba(block_size: int, topk: int) -> LayerAttention:
    return LayerAttention(kind="moba", block_size=block_size, topk=topk)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, {"qkv_bias": True}, {"qk_norm": True, "num_kv_heads": 1}, {"key_conv": 5}]
)
def test_parameter_counts_equal_a_built_model(changes):
    config = tiny_config(**changes)
    model, counts = build(config), parameter_counts(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts.total == sum(sizes.values())
    assert counts.embedding == sizes["embedding.weight"]
    assert counts.head == sizes.get("head.weight", 0)
    assert counts.non_embedding == counts.total - counts.embedding - counts.head
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert counts.matmul == sum(linear.weight.numel() for linear in linears)
    assert counts.key_conv == sum(size for name, size in sizes.items() if "key_conv" in name)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 6))
def test_pairs_equal_the_routing(lengths, block_size, topk):
    cu_seqlens = pack(lengths)[2]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, sum(lengths), 1, 4, generator=generator)
    past = select_blocks(q, k, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens)[:, 0]
    position = torch.cat([torch.arange(length) for length in lengths])
    seen = position % block_size + 1 + (past >= 0).sum(1) * block_size  # past blocks are whole
    assert attention_pairs(moba(block_size, topk), lengths) == int(seen.sum())
    assert attention_pairs(FULL, lengths) == int((position + 1).sum())

    document = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    scored = (position // block_size)[document > topk * block_size].sum() if topk > 1 else 0
    assert gate_pairs(moba(block_size, topk), lengths) == int(scored)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 50))
def test_sliding_pairs_by_counting(lengths, window):
    attention = LayerAttention(kind="sliding", window=window)
    seen = sum(min(position + 1, window) for length in lengths for position in range(length))
    assert attention_pairs(attention, lengths) == seen
    assert gate_pairs(attention, lengths) == 0


def test_wide_moba_counts_as_full():
    assert attention_pairs(moba(8, 10), [80, 3]) == attention_pairs(FULL, [80, 3])
    assert gate_pairs(moba(8, 10), [80, 3]) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_full_flops_equal_torchs_counter(tied):
    config, lengths = tiny_config(tie_embeddings=tied), [40, 24]
    model, inputs = build(config, backend="reference", loss="reference"), pack(lengths)
    with FlopCounterMode(display=False) as counter:
        model(*inputs, inputs[0]).sum().backward()
    # torch counts the whole L x L square of each document; the causal half is what a kernel must do.
    square, causal = sum(length**2 for length in lengths), attention_pairs(FULL, lengths)
    per_pair = 12 * config.num_heads * config.head_dim * config.num_layers
    flops = training_flops(config, (FULL, FULL), lengths)
    assert counter.get_total_flops() == flops.dense_equivalent + per_pair * (square - causal)
    assert flops.executed == flops.dense_equivalent


def test_moba_flops_by_hand():
    """One document of 20 tokens, B=4, topk=2: five blocks of 10 own pairs, 16 queries that see one past block of 4."""
    config = tiny_config()
    attention = AttentionConfig(rule="last 1 full, rest moba(4, 2)").per_layer(2)
    flops = training_flops(config, attention, [20])
    matmul = 6 * 20 * parameter_counts(config).matmul
    full_layer = 12 * 64 * 210
    moba_layer = 12 * 64 * (5 * 10 + 16 * 4)
    gate = 2 * 64 * 4 * (1 + 2 + 3 + 4) + 32 * 20
    assert flops.dense_equivalent == matmul + 2 * full_layer
    assert flops.executed == matmul + full_layer + moba_layer + gate
    assert flops_per_token(config, attention, [20]) == (flops.dense_equivalent / 20, flops.executed / 20)


def test_hybrid_flops_by_hand():
    """One document of 20 tokens: a window of 6 is 6 · 7 / 2 pairs and 14 · 6 more; a convolution of 3 has 3 · 32 weights a layer."""
    config = tiny_config(key_conv=3)
    attention = AttentionConfig(rule="last 1 full, rest sliding(6)").per_layer(2)
    flops = training_flops(config, attention, [20])
    per_parameter = 6 * 20 * (parameter_counts(tiny_config()).matmul + 2 * 3 * 32)
    assert flops.executed == per_parameter + 12 * 64 * (210 + 21 + 84)
    assert flops.dense_equivalent == per_parameter + 2 * 12 * 64 * 210


def test_long_documents_do_not_overflow_and_many_are_quick():
    million = 1 << 20
    assert attention_pairs(FULL, [million] * 64) == 64 * million * (million + 1) // 2
    # 11 past blocks for each of 256 blocks, less what the first eleven lack: block b has only b behind it.
    past = 4096 * 4096 * (11 * 256 - sum(11 - b for b in range(11)))
    assert attention_pairs(moba(4096, 12), [million]) == 256 * (4096 * 4097 // 2) + past
    config = tiny_config(num_layers=4)
    attention = AttentionConfig(rule="last 2 full, rest moba(512, 3)").per_layer(4)
    lengths = list(range(1, 1001))
    start = time.perf_counter()
    for _ in range(20):
        training_flops(config, attention, lengths)
    assert (time.perf_counter() - start) / 20 < 0.01
