"""Cached generation against the uncached forward pass, sampling, and refused input."""

import pytest
import torch

from model.generate import Cursor, choose_token, generate
from tests.model.helpers import RULES, build, pack, tiny_config

VARIANTS = {"gqa": {}, "mha": {"num_kv_heads": 4}, "qwen": {"qkv_bias": True, "qk_norm": True, "tie_embeddings": False}}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", [*RULES, "moba(8, 1)", "moba(1, 4)"])
def test_cached_logits_equal_uncached(rule, variant, dtype, tolerance):
    model = build(tiny_config(init_std=0.1, **VARIANTS[variant]), rule).to(dtype)
    tokens, positions, cu_seqlens = pack([61])
    with torch.inference_mode():
        expected = model(tokens, positions, cu_seqlens)
        for prompt in (1, 8, 21):
            cursor = Cursor(model, capacity=61)
            cached = [cursor.advance(tokens[:prompt])]
            cached += [cursor.advance(tokens[i : i + 1]) for i in range(prompt, 61)]
            torch.testing.assert_close(torch.stack(cached), expected[prompt - 1 :], rtol=tolerance, atol=tolerance)


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
        ([1] * 250, {}, r"250 \+ 10 = 260 tokens; the model's max_seq_len=256"),
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
