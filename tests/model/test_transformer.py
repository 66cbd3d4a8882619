"""The decoder's consequences: documents apart, no look ahead, attention and RoPE that switch, the loss."""

import pytest
import torch

from configs.layers import LayerAttention
from configs.schema import AttentionConfig, RopeConfig
from model.layers import RMSNorm
from model.ops import moba
from model.ops.loss import tiled
from model.rope import rotary_table, rotate
from model.transformer import Transformer
from tests.model.helpers import HYBRIDS, RULES, build, pack, tiny_config

LENGTHS = [37, 1, 64, 23]


def logits(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


# Every kind of attention, with key convolutions of width `key_conv` and a layer without positions.
MODELS = [*((rule, 0) for rule in RULES), *((rule, 5) for rule in ("full", *HYBRIDS))]


@pytest.mark.parametrize(("rule", "key_conv"), MODELS)
def test_packed_documents_equal_separate_forwards(rule, key_conv):
    model = build(tiny_config(key_conv=key_conv), rule, nope="last 1" if key_conv else "").double()
    tokens, positions, cu_seqlens = pack(LENGTHS)
    together = logits(model, tokens, positions, cu_seqlens)
    parts = [pack([length])[1:] for length in LENGTHS]
    apart = [logits(model, piece, *part) for piece, part in zip(tokens.split(LENGTHS), parts, strict=True)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("rule", "key_conv"), MODELS)
def test_future_and_other_documents_change_nothing_bit_for_bit(rule, key_conv, backend):
    model = build(tiny_config(key_conv=key_conv), rule, nope="last 1" if key_conv else "", backend=backend)
    tokens, positions, cu_seqlens = pack(LENGTHS)
    before = logits(model, tokens, positions, cu_seqlens)
    first, changed, last = 38, 38 + 29, 102  # the third document, and a token inside it
    perturbed = tokens.clone()
    perturbed[changed:last] = (perturbed[changed:last] + 1) % 96
    after = logits(model, perturbed, positions, cu_seqlens)
    untouched = [*range(changed), *range(last, len(tokens))]
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(before[changed:last], after[changed:last])

    perturbed = (tokens + 1) % 96
    perturbed[first:last] = tokens[first:last]
    assert torch.equal(before[first:last], logits(model, perturbed, positions, cu_seqlens)[first:last])


@pytest.mark.parametrize(("rule", "key_conv"), [*((rule, 0) for rule in RULES[1:]), ("sliding(4)", 0), ("sliding(4)", 5)])
def test_no_gradient_reaches_the_past_from_an_unrelated_document(rule, key_conv):
    model = build(tiny_config(tie_embeddings=False, key_conv=key_conv), rule)
    tokens = torch.arange(48) % 48  # each token once, so that an embedding row belongs to one position
    positions, cu_seqlens = pack([24, 24])[1:]
    model(tokens, positions, cu_seqlens)[30].sum().backward()
    influence = model.embedding.weight.grad.abs().sum(dim=1)
    assert influence[24:31].all() and not influence[:24].any() and not influence[31:].any()


@pytest.mark.parametrize(("window", "key_conv", "reached"), [(1, 0, 0), (3, 0, 4), (3, 3, 8), (3, 5, 12)])
def test_a_token_reaches_back_by_its_windows_and_convolutions(window, key_conv, reached):
    """In each of two layers: window - 1 tokens, of which the last was made from the key_conv - 1 before it."""
    model = build(tiny_config(tie_embeddings=False, key_conv=key_conv), f"sliding({window})")
    tokens, (_, positions, cu_seqlens) = torch.arange(40), pack([40])
    model(tokens, positions, cu_seqlens)[30].sum().backward()
    influence = model.embedding.weight.grad.abs().sum(dim=1)
    assert influence[30 - reached : 31].all() and not influence[: 30 - reached].any() and not influence[31:].any()


@pytest.mark.parametrize("rule", ["full", "moba(4, 2)"])
def test_layers_without_positions_do_not_know_the_order_of_what_is_before(rule):
    """Without positions a token sees a set, in MoBA a set in each block; in a layer with positions the order matters."""
    tokens, positions, cu_seqlens = pack([12])
    swapped = tokens[[1, 0, 2, 3, 5, 4, *range(6, 12)]]
    config = tiny_config(num_layers=1)
    bare, turned = (build(config, rule, nope=nope).double() for nope in ("all", ""))
    last = [logits(bare, sequence, positions, cu_seqlens)[-1] for sequence in (tokens, swapped)]
    torch.testing.assert_close(*last, rtol=1e-12, atol=1e-12)
    last = [logits(turned, sequence, positions, cu_seqlens)[-1] for sequence in (tokens, swapped)]
    assert (last[0] - last[1]).abs().max() > 1e-3


def test_positions_are_left_out_of_the_named_layers_alone():
    """A model of three layers whose first two are named equals one with positions in which those two have a table of zeros."""
    model, inputs = build(tiny_config(num_layers=3), nope="first 2").double(), pack(LENGTHS)
    x, cu_seqlens = model.embedding(inputs[0]), inputs[2]
    still, table = (rotary_table(positions, 16, model.rope) for positions in (inputs[1] * 0, inputs[1]))
    for layer, turn in zip(model.layers, (still, still, table), strict=True):
        x = layer(x, turn, cu_seqlens, model.attention[0], "auto", model.workspace)
    torch.testing.assert_close(model(*inputs), model.head(model.final_norm(x)), rtol=1e-12, atol=1e-12)


def test_checkpoints_move_between_full_and_moba():
    full, moba = build(tiny_config(), "full", seed=0), build(tiny_config(), "moba(8, 2)", seed=1)
    assert list(full.state_dict()) == list(moba.state_dict())
    assert not list(full.buffers())
    assert set(full.state_dict()) == {name for name, _ in full.named_parameters(remove_duplicate=False)}
    moba.load_state_dict(full.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), moba.parameters(), strict=True))
    inputs = pack(LENGTHS)
    assert not torch.equal(logits(full, *inputs), logits(moba, *inputs))
    moba.set_attention(full.attention)
    assert torch.equal(logits(full, *inputs), logits(moba, *inputs))


def test_switching_there_and_back_is_exact():
    model, inputs = build(tiny_config(), "full"), pack(LENGTHS)
    first, rope = logits(model, *inputs), model.rope
    model.set_attention(AttentionConfig(rule="moba(8, 2)").per_layer(2))
    model.set_rope(RopeConfig(theta=500.0))
    assert not torch.equal(first, logits(model, *inputs))
    model.set_attention(AttentionConfig(rule="full").per_layer(2))
    assert not torch.equal(first, logits(model, *inputs))
    model.set_rope(rope)
    assert torch.equal(first, logits(model, *inputs))


def test_moba_that_sees_every_block_equals_full_attention():
    model, inputs = build(tiny_config(), "full").double(), pack(LENGTHS)
    first = logits(model, *inputs)
    model.set_attention(AttentionConfig(rule="moba(8, 8)").per_layer(2))
    torch.testing.assert_close(logits(model, *inputs), first, rtol=1e-10, atol=1e-10)


def test_wrong_attention_is_refused():
    config, full = tiny_config(), LayerAttention(kind="full")
    with pytest.raises(ValueError, match="names 3 layers; the model has num_layers=2"):
        Transformer(config, (full,) * 3, RopeConfig())
    with pytest.raises(ValueError, match="kind='window'; accepted: full, moba, sliding"):
        Transformer(config, (full, LayerAttention(kind="window")), RopeConfig())
    with pytest.raises(ValueError, match="backend='fast'; accepted: auto, reference"):
        Transformer(config, (full, full), RopeConfig(), backend="fast")


def test_the_workspace_reaches_every_moba_layer(monkeypatch):
    model, inputs = build(tiny_config(), "moba(8, 2)"), pack(LENGTHS)
    given, attend = [], moba.moba_attention

    def record(*tensors, workspace, **more):
        given.append(workspace)
        return attend(*tensors, workspace=workspace, **more)

    monkeypatch.setattr(moba, "moba_attention", record)
    model(*inputs)
    model.workspace = 5
    model(*inputs)
    assert given == [1 << 30] * 2 + [5] * 2


def test_loss_is_the_cross_entropy_of_labelled_tokens():
    model = build(tiny_config()).to(torch.bfloat16)
    tokens, positions, cu_seqlens = pack(LENGTHS)
    labels = tokens.roll(-1)
    labels[cu_seqlens[1:].long() - 1] = -100
    losses = model(tokens, positions, cu_seqlens, labels)
    assert losses.shape == tokens.shape and losses.dtype == torch.float32
    scored = labels != -100
    assert not losses[~scored].any()
    expected = -model(tokens, positions, cu_seqlens).float().log_softmax(-1)[scored, labels[scored]]
    torch.testing.assert_close(losses[scored], expected)


@pytest.mark.parametrize("tied", [True, False])
def test_tiles_change_neither_loss_nor_gradient(monkeypatch, tied):
    monkeypatch.setattr(tiled, "LOGITS_BYTES", 8 * 96 * 30)
    tokens, positions, cu_seqlens = pack(LENGTHS)
    labels = tokens.roll(-1)
    labels[10:40] = -100
    results = []
    for ways in ({"loss": "reference"}, {"loss": "torch", "ffn_tile": 32}):
        model = build(tiny_config(tie_embeddings=tied), **ways).double()
        losses = model(tokens, positions, cu_seqlens, labels)
        (losses.sum() * 0.1).backward()
        results.append([losses.detach(), *(parameter.grad for parameter in model.parameters())])
    for at_once, in_tiles in zip(*results, strict=True):
        torch.testing.assert_close(in_tiles, at_once, rtol=1e-10, atol=1e-10)


def test_rotation_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(m: int, n: int) -> float:
        tables = [rotary_table(torch.tensor([p]), 16, RopeConfig()) for p in (m, n)]
        return float((rotate(q, tables[0]) * rotate(k, tables[1])).sum())

    assert score(3, 3) == pytest.approx(float((q * k).sum()), abs=1e-5)
    assert score(103, 99) == pytest.approx(score(7, 3), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_rotation_of_bf16_is_computed_in_fp32():
    x = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    table = rotary_table(torch.arange(100_000, 100_005), 16, RopeConfig())
    assert torch.equal(rotate(x, table), rotate(x.float(), table).to(torch.bfloat16))


def test_rms_norm_is_computed_in_fp32():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    wide = x.float()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(norm(x), exact.to(torch.bfloat16))
