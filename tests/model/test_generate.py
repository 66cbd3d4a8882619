"""Cached generation against the uncached forward pass, sampling, and refused input."""

import pytest
import torch

from configs.schema import RopeConfig, RopeScaling
from model.generate import Cursor, choose_token, generate
from tests.model.helpers import HYBRIDS, RULES, build, pack, tiny_config

VARIANTS = {"gqa": {}, "mha": {"num_kv_heads": 4}, "qwen": {"qkv_bias": True, "qk_norm": True, "tie_embeddings": False}}
CONVOLVED = [(width, rule, nope) for width in (0, 3, 5) for rule in HYBRIDS for nope in ("", "every 2")]


def cached_equals_uncached(model, prompts: tuple[int, ...], tolerance: float) -> None:
    """Logits after every prompt length and each later token, with a cache and without one."""
    tokens, positions, cu_seqlens = pack([61])
    with torch.inference_mode():
        expected = model(tokens, positions, cu_seqlens)
        for prompt in prompts:
            cursor = Cursor(model, capacity=61)
            cached = [cursor.advance(tokens[:prompt])]
            cached += [cursor.advance(tokens[i : i + 1]) for i in range(prompt, 61)]
            torch.testing.assert_close(torch.stack(cached), expected[prompt - 1 :], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", [*RULES, "moba(8, 1)", "moba(1, 4)"])
def test_cached_logits_equal_uncached(rule, variant, dtype, tolerance):
    cached_equals_uncached(build(tiny_config(init_std=0.1, **VARIANTS[variant]), rule).to(dtype), (1, 8, 21), tolerance)


@pytest.mark.parametrize(("width", "rule", "nope"), CONVOLVED)
def test_cached_logits_equal_uncached_with_windows_convolved_keys_and_without_positions(width, rule, nope):
    model = build(tiny_config(init_std=0.1, key_conv=width), rule, nope=nope).double()
    cached_equals_uncached(model, (1, 4, 21), 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_greedy_tokens_equal_uncached(rule):
    model, (tokens, _, _) = build(tiny_config(), rule).double(), pack([19])
    sequence = tokens
    with torch.inference_mode():
        for _ in range(30):
            logits = model(sequence, torch.arange(len(sequence)), torch.tensor([0, len(sequence)], dtype=torch.int32))
            sequence = torch.cat([sequence, logits[-1].argmax()[None]])
    new_tokens = generate(model, tokens, max_new_tokens=30)
    assert new_tokens.dtype == torch.int64 and torch.equal(new_tokens, sequence[19:])


def test_cache_keeps_no_more_than_it_reads():
    model, (tokens, _, _) = build(tiny_config(), "last 1 full, rest moba(8, 3)"), pack([21])
    cursor = Cursor(model, capacity=30)
    cursor.advance(tokens)
    moba, full = cursor.caches
    assert moba.block_means.shape == (2, 2, 16) and len(full.block_means) == 0
    torch.testing.assert_close(moba.block_means, moba.keys[:16].view(2, 8, 2, 16).mean(1))


def test_a_sliding_layer_keeps_its_window_and_a_convolution_its_width():
    model, (tokens, _, _) = build(tiny_config(key_conv=5), "every 2 moba(8, 3), rest sliding(8)"), pack([40])
    cursor = Cursor(model, capacity=50)
    for count, (first, last) in enumerate(((0, 3), (3, 4), (4, 5), (5, 6)), start=3):
        cursor.advance(tokens[first:last])
        assert [len(cache.raw_keys) for cache in cursor.caches] == [min(count, 4)] * 2
    for token in range(6, 40):
        cursor.advance(tokens[token : token + 1])
    sliding, moba = cursor.caches
    assert sliding.keys.shape == sliding.values.shape == (8, 2, 16) and moba.keys.shape == (40, 2, 16)
    assert sliding.raw_keys.untyped_storage().nbytes() == 4 * 32 * 4


@pytest.mark.parametrize(("width", "rule"), [(0, "moba(8, 3)"), (3, "every 2 moba(8, 2), rest sliding(5)"), (5, "full")])
def test_a_cursor_that_comes_back_has_read_nothing_since(width, rule):
    model, (tokens, _, _) = build(tiny_config(key_conv=width), rule).double(), pack([40])
    cursor = Cursor(model, capacity=40)
    with torch.inference_mode():
        cursor.advance(tokens[:14])
        place = cursor.mark()
        once = [cursor.advance(tokens[i : i + 1]) for i in range(14, 27)]
        for later in (tokens.flip(0), tokens):
            cursor.rewind(place)
            again = [cursor.advance(later[i : i + 1]) for i in range(14, 27)]
    assert cursor.length == 27 and all(map(torch.equal, again, once))


def test_generation_stops_where_it_is_told():
    model, (tokens, _, _) = build(tiny_config()), pack([10])
    new_tokens = generate(model, tokens, max_new_tokens=20)
    assert torch.equal(generate(model, tokens, max_new_tokens=20, stop=lambda found: len(found) == 6), new_tokens[:6])


@pytest.mark.parametrize("rule", ["sliding(9)", "every 2 moba(8, 2), rest sliding(9)"])
def test_windows_do_not_limit_generation(rule):
    model = build(tiny_config(max_seq_len=16), rule, nope="every 2")
    assert len(generate(model, torch.ones(12, dtype=torch.int64), max_new_tokens=20)) == 20


def test_scaled_positions_lengthen_generation():
    model = build(tiny_config(max_seq_len=16))
    with pytest.raises(ValueError, match=r"12 \+ 20 = 32 tokens; the model's RoPE is good for 16"):
        generate(model, torch.ones(12, dtype=torch.int64), max_new_tokens=20)
    model.set_rope(RopeConfig(scaling=RopeScaling.LINEAR, factor=2.0))
    assert len(generate(model, torch.ones(12, dtype=torch.int64), max_new_tokens=20)) == 20


def test_generation_stops_after_eos():
    model, (tokens, _, _) = build(tiny_config()), pack([10])
    new_tokens = generate(model, tokens, max_new_tokens=20)
    eos = int(new_tokens[7])
    stop = new_tokens.tolist().index(eos) + 1
    assert generate(model, tokens, max_new_tokens=20, eos_id=eos).tolist() == new_tokens[:stop].tolist()


def test_sampling_follows_the_seed():
    model, (tokens, _, _) = build(tiny_config(init_std=0.05)), pack([10])
    options = {"max_new_tokens": 20, "temperature": 1.0}
    assert torch.equal(generate(model, tokens, seed=1, **options), generate(model, tokens, seed=1, **options))
    assert not torch.equal(generate(model, tokens, seed=1, **options), generate(model, tokens, seed=2, **options))


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.91, {0, 1, 2, 3}), (0.89, {0, 1, 3}), (0.7, {1, 3}), (1e-9, {1})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = torch.tensor([0.15, 0.5, 0.1, 0.25])
    generator = torch.Generator().manual_seed(0)
    drawn = [choose_token(probs.log(), 1.0, top_p, generator) for _ in range(2000)]
    assert set(drawn) == kept
    share = probs[1] / probs[sorted(kept)].sum()
    assert drawn.count(1) / 2000 == pytest.approx(float(share), abs=0.04)


def test_temperature_sharpens():
    probs, generator = torch.tensor([0.6, 0.4]), torch.Generator().manual_seed(0)
    drawn = [choose_token(probs.log(), 0.5, 1.0, generator) for _ in range(4000)]
    assert drawn.count(0) / 4000 == pytest.approx(0.36 / (0.36 + 0.16), abs=0.03)
    assert {choose_token(probs.log(), 1e-4, 1.0, generator) for _ in range(50)} == {0}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 250, {}, r"250 \+ 10 = 260 tokens; the model's RoPE is good for 256"),
        ([3, 96], {}, r"tokens 3\.\.96; the model's vocabulary is 0\.\.95"),
        ([-1], {}, "tokens -1"),
        ([[1]], {}, r"shape \(1, 1\)"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_requests_are_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(tiny_config()), torch.tensor(prompt, dtype=torch.int64), **{"max_new_tokens": 10, **options})


def test_the_longest_sequence_is_accepted():
    assert len(generate(build(tiny_config()), torch.ones(254, dtype=torch.int64), max_new_tokens=2)) == 2
