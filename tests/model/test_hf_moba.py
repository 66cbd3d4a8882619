"""The classes that exported MoBA models run as in transformers: equal to ours, cached, batched and padded."""

from dataclasses import replace

import pytest
import torch

from configs.model_file import ModelFile
from configs.schema import AttentionConfig, RopeConfig, RopeScaling
from model import hf_moba
from model.generate import generate
from model.hf import from_config, to_config, to_theirs
from model.transformer import Transformer
from tests.model.helpers import build, pack, tiny_config

FEATURES = {"Llama": {}, "Qwen2": {"qkv_bias": True}, "Qwen3": {"qk_norm": True}, "Mistral": {"hidden_size": 40, "num_heads": 6}}
RULE = "layers 1 full, rest moba(8, 3)"
YARN = RopeConfig(theta=5000.0, scaling=RopeScaling.YARN, factor=4.0, original_max_seq_len=64)


def export(ours: Transformer, rule: str, family: str, **settings: object):
    """Our model as transformers loads it, without files."""
    described = ModelFile(model=ours.config, rope=ours.rope, attention=AttentionConfig(rule=rule))
    values = to_config(described, dtype="float32", token_ids={"bos_token_id": 1, "eos_token_id": 2})
    assert values["auto_map"]["AutoModelForCausalLM"] == f"modeling_moba.Moba{family}ForCausalLM"
    read = from_config(values)
    assert (read.model, read.attention.per_layer(3)) == (described.model, described.attention.per_layer(3))
    assert replace(read.rope, nope="") == replace(described.rope, nope="") and read.rope.nope_layers(3) == described.rope.nope_layers(3)
    config = getattr(hf_moba, f"Moba{family}Config").from_dict(values)
    theirs = getattr(hf_moba, f"Moba{family}ForCausalLM")(config, **settings).eval()
    tensors = {to_theirs(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(tensors)
    return theirs


def make_pair(family: str = "Llama", rule: str = RULE, rope: RopeConfig = YARN):
    config = tiny_config(num_layers=3, **FEATURES[family])
    ours = build(config, rule).eval()
    ours.set_rope(rope)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():  # biases and norms that do something
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    return ours, export(ours, rule, family)


@torch.no_grad()
def our_logits(ours: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return ours(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32))


@pytest.mark.parametrize("family", FEATURES)
def test_logits_equal_ours_at_every_length(family):
    ours, theirs = make_pair(family)
    for length in (1, 7, 8, 9, 63, 200):
        tokens = pack([length])[0]
        with torch.no_grad():
            found = theirs(tokens[None]).logits[0]
        torch.testing.assert_close(found, our_logits(ours, tokens), rtol=0, atol=1e-4)
    ours.set_attention(AttentionConfig(rule="full").per_layer(3))
    assert (found - our_logits(ours, tokens)).abs().max() > 0.05  # the blocks that are not seen count


@pytest.mark.parametrize(
    "rule",
    [
        "moba(16, 1)",
        "moba(7, 2)",
        "layers 0 moba(4, 5), layers 2 full, rest moba(8, 2)",
        "moba(64, 9)",
        "layers 0 sliding(1), layers 2 sliding(20), rest full",
        "layers 1 moba(8, 2), rest sliding(9)",
    ],
)
def test_every_rule(rule, monkeypatch):
    ours, theirs = make_pair(rule=rule)
    tokens = pack([150])[0]
    expected = our_logits(ours, tokens)
    torch.testing.assert_close(theirs(tokens[None]).logits[0].detach(), expected, rtol=0, atol=1e-4)
    monkeypatch.setattr(hf_moba, "_MASK_BUDGET", 4 * 150 * 3)  # three queries at a time
    torch.testing.assert_close(theirs(tokens[None]).logits[0].detach(), expected, rtol=0, atol=1e-4)


def test_layers_without_positions():
    ours, theirs = make_pair(rope=replace(YARN, nope="layers 0 2"))
    tokens = pack([150])[0]
    found = theirs(tokens[None]).logits[0].detach()
    torch.testing.assert_close(found, our_logits(ours, tokens), rtol=0, atol=1e-4)
    ours.set_rope(YARN)
    assert (found - our_logits(ours, tokens)).abs().max() > 0.05
    ours, theirs = make_pair(rule="full", rope=replace(YARN, nope="last 1"))  # full attention, but no plain Llama
    torch.testing.assert_close(theirs(tokens[None]).logits[0].detach(), our_logits(ours, tokens), rtol=0, atol=1e-4)


def test_positions_that_are_divided_besides():
    rope = replace(YARN, interpolation=3.0)
    ours, theirs = make_pair(rule="full", rope=rope)
    tokens = pack([200])[0]
    found = theirs(tokens[None]).logits[0].detach()
    torch.testing.assert_close(found, our_logits(ours, tokens), rtol=0, atol=1e-4)
    ours.set_rope(YARN)
    assert (found - our_logits(ours, tokens)).abs().max() > 0.05


def test_tied_blocks_go_to_the_earlier_one():
    queries, means = torch.ones(2, 3, 4), torch.ones(1, 5, 4)
    seen = hf_moba._seen(queries, means, 40, 43, 8, 3)
    assert seen[..., :16].all() and not seen[..., 16:40].any()
    assert torch.equal(seen[0, :, 40:], torch.ones(3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rule", [RULE, "layers 1 moba(8, 2), rest sliding(9)"])
def test_generation_with_their_cache_is_ours(rule, cache):
    ours, theirs = make_pair(rule=rule)
    prompt = pack([45])[0]
    expected = generate(ours, prompt, max_new_tokens=30)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones(1, 45, dtype=torch.int64)}
    found = theirs.generate(prompt[None], cache_implementation=None if cache == "dynamic" else "static", disable_compile=True, **settings)
    assert found[0, 45:].tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 5


def test_a_prompt_in_chunks_is_the_prompt():
    ours, theirs = make_pair()
    tokens = pack([90])[0]
    with torch.no_grad():
        cache, parts = None, []
        for chunk in tokens.split([37, 1, 30, 22]):
            done = theirs(chunk[None], past_key_values=cache, use_cache=True)
            cache = done.past_key_values
            parts.append(done.logits[0])
    torch.testing.assert_close(torch.cat(parts), our_logits(ours, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(side):
    ours, theirs = make_pair()
    rows = [pack([length], seed=length)[0] for length in (61, 20, 44)]
    tokens, mask = torch.zeros(3, 61, dtype=torch.int64), torch.zeros(3, 61, dtype=torch.int64)
    places = [slice(61 - len(row), 61) if side == "left" else slice(0, len(row)) for row in rows]
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[number, place], mask[number, place] = row, 1
    with torch.no_grad():
        logits = theirs(tokens, attention_mask=mask).logits
    for found, row, place in zip(logits, rows, places, strict=True):
        torch.testing.assert_close(found[place], our_logits(ours, row), rtol=0, atol=1e-4)


def test_left_padded_generation_is_that_of_each_row():
    ours, theirs = make_pair()
    rows = [pack([length], seed=length)[0] for length in (30, 12)]
    tokens, mask = torch.zeros(2, 30, dtype=torch.int64), torch.ones(2, 30, dtype=torch.int64)
    tokens[0], tokens[1, 18:], mask[1, :18] = rows[0], rows[1], 0
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = theirs.generate(tokens, attention_mask=mask, **settings)
    assert [row[30:].tolist() for row in found] == [generate(ours, row, max_new_tokens=20).tolist() for row in rows]


def test_gradients_are_ours():
    ours, theirs = make_pair("Qwen2")
    tokens, positions, cu_seqlens = pack([100])
    ours(tokens, positions, cu_seqlens).square().mean().backward()
    theirs(tokens[None]).logits.square().mean().backward()
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(to_theirs(name)).grad
        torch.testing.assert_close(other, parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))


def test_what_would_be_wrong_is_refused():
    _, theirs = make_pair()
    tokens, mask = pack([20])[0][None], torch.ones(1, 20, dtype=torch.int64)
    mask[0, 5:8] = 0
    with pytest.raises(ValueError, match="padding inside the text"):
        theirs(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="one document a row"):
        theirs(tokens, position_ids=torch.cat([torch.arange(12), torch.arange(8)])[None], use_cache=False)
    with pytest.raises(ValueError, match="attention_mask as"):
        theirs(tokens, attention_mask=torch.zeros(1, 1, 20, 20))
    with pytest.raises(ValueError, match="attn_implementation='sdpa': would make every layer full"):
        theirs.set_attn_implementation("sdpa")
    config = theirs.config
    for layers, says in ((["full"], "must name the attention of 3 layers"), (["full", "moba(0, 2)", "full"], r"'moba\(0, 2\)'")):
        config.attention_layers = layers
        with pytest.raises(ValueError, match=says):
            hf_moba.MobaLlamaForCausalLM(config)
