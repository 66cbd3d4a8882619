"""Sliding-window attention: the torch path against the reference, the reference against the definition, and the guarantees."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops.full import full_attention
from model.ops.sliding import chunked, sliding_attention, varlen
from tests.model.ops.helpers import (
    assert_all_close,
    assert_error_within_twice,
    assert_fills_nothing_for_no_gradient,
    cu_seqlens,
    forward_backward,
    largest_tensor,
    make_inputs,
    plain_attention,
    with_dtype,
)

BOUNDS = [0, 1, 64, 129, 130, 300]


def sliding(backend, window, bounds=BOUNDS):
    return partial(sliding_attention, window=window, cu_seqlens=cu_seqlens(bounds), backend=backend)


def seen(bounds, window):
    """bool `[T, T]`, pair by pair."""
    visible = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool)
    for start, end in itertools.pairwise(bounds):
        for t in range(start, end):
            visible[t, max(start, t - window + 1) : t + 1] = True
    return visible


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks, whose windows begin before, on and after a chunk's own first token."""
    monkeypatch.setattr(chunked, "_CHUNK_BUDGET", {"cpu": 1, "default": 1})


@pytest.mark.parametrize("window", [1, 2, 16, 17, 31, 64, 169, 170, 1000])
def test_reference_is_the_definition(window):
    inputs = make_inputs(BOUNDS[-1], 4, 2, 8, seed=60)
    plain = partial(plain_attention, visible=seen(BOUNDS, window))
    assert_all_close(forward_backward(sliding("reference", window), inputs), forward_backward(plain, inputs), atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 31, 64, 169, 170, 1000])
@pytest.mark.parametrize("num_heads, num_kv, head_dim", [(4, 4, 5), (4, 1, 32), (6, 2, 64)])
def test_fp64_equals_reference(num_heads, num_kv, head_dim, window, small_chunks):
    inputs = make_inputs(BOUNDS[-1], num_heads, num_kv, head_dim, seed=61)
    expected = forward_backward(sliding("reference", window), inputs)
    for backend in ("torch", "auto"):
        assert_all_close(forward_backward(sliding(backend, window), inputs), expected, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(1, 80), st.sampled_from([16, 32, 1024]))
def test_any_documents_and_any_chunk_equal_reference(lengths, window, size):
    bounds = [0, *itertools.accumulate(lengths)]
    inputs = make_inputs(bounds[-1], 2, 1, 4, seed=62)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_MIN_CHUNK", size)
        patch.setattr(chunked, "_MAX_CHUNK", size)
        results = forward_backward(sliding("torch", window, bounds), inputs)
    assert_all_close(results, forward_backward(sliding("reference", window, bounds), inputs), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    low = make_inputs(BOUNDS[-1], 4, 2, 64, seed=64, dtype=dtype)
    exact = forward_backward(sliding("reference", 40), with_dtype(low, torch.float64))
    plain = forward_backward(partial(plain_attention, visible=seen(BOUNDS, 40)), low)
    results = forward_backward(sliding("torch", 40), low)
    assert all(x.dtype == dtype for x in results.values())
    assert_error_within_twice(results, plain, exact)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kept", [slice(0, 97), slice(64, 129), slice(130, 220)], ids=str)
def test_later_tokens_and_other_documents_change_no_bit(kept, backend, small_chunks):
    q, k, v, d_out = make_inputs(300, 4, 2, 32, seed=65, dtype=torch.float32)
    is_kept = torch.zeros(300, 1, 1, dtype=torch.bool)
    is_kept[kept] = True
    noise = torch.Generator().manual_seed(0)
    other = [torch.where(is_kept, x, torch.randn(x.shape, generator=noise)).detach().requires_grad_() for x in (q, k, v)]
    before = forward_backward(sliding(backend, 20), [q, k, v, d_out * is_kept])
    after = forward_backward(sliding(backend, 20), [*other, d_out * is_kept])
    for name in before:
        assert torch.equal(before[name][kept], after[name][kept]), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_tokens_that_have_left_the_window_change_no_bit(backend, small_chunks):
    q, k, v, _ = (x.detach() for x in make_inputs(200, 4, 2, 32, seed=66, dtype=torch.float32))
    run = partial(sliding_attention, window=20, backend=backend)
    before = run(q, k, v)
    k[:100] += 1
    v[:100] -= 1
    changed = (run(q, k, v) != before).flatten(1).any(dim=1)
    assert changed[:119].all() and not changed[119:].any()  # query 118 still sees token 99


def test_a_window_of_one_is_the_value_itself():
    q, k, v, _ = make_inputs(50, 4, 2, 16, seed=67)
    torch.testing.assert_close(sliding_attention(q, k, v, window=1), v.repeat_interleave(2, dim=1), rtol=0, atol=1e-14)


def test_a_window_wider_than_every_document_is_full_attention():
    q, k, v, _ = make_inputs(BOUNDS[-1], 4, 2, 16, seed=68)
    longest = 170
    assert torch.equal(sliding("auto", longest)(q, k, v), full_attention(q, k, v, cu_seqlens=cu_seqlens(BOUNDS)))
    assert not torch.equal(sliding("auto", longest - 1)(q, k, v), full_attention(q, k, v, cu_seqlens=cu_seqlens(BOUNDS)))


def test_memory_is_linear_in_the_tokens():
    """No tensor is larger than q, but for the scores of a chunk, whose size does not depend on T."""
    size_of_q = 4096 * 2 * 16 * 4
    assert largest_tensor(partial(sliding_attention, window=64), 4096) <= 1.5 * size_of_q


def test_scale_and_autocast():
    q, k, v, _ = make_inputs(60, 2, 1, 32, seed=69, dtype=torch.float32)
    run = partial(sliding_attention, window=9)
    expected = run(q, k, v, softmax_scale=0.3)
    torch.testing.assert_close(expected, run(q, k, v, softmax_scale=0.3, backend="reference"), rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, run(q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(q, k, v, softmax_scale=0.3), expected)


def test_named_varlen_says_why_it_cannot():
    q, k, v, _ = make_inputs(20, 2, 1, 32, seed=70, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend='varlen': (q is on cpu|PyTorch .* has no varlen_attn).*; backend='torch' takes others"):
        sliding_attention(q, k, v, window=9, backend="varlen")


def test_varlen_is_called_as_pytorch_documents_it(monkeypatch):
    """PyTorch's function needs a GPU. This one does what its documentation says, per document, with a window of (before, after)."""

    def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        bounds = cu_seq_q.tolist()
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == max(end - start for start, end in itertools.pairwise(bounds))
        assert enable_gqa == (query.shape[1] != key.shape[1])
        before, after = window_size
        position = torch.arange(bounds[-1])
        distance = position[:, None] - position
        document = torch.bucketize(position, cu_seq_q[1:], right=True)
        visible = (distance <= before) & (distance >= -after) & (document[:, None] == document)
        return plain_attention(query * scale * query.shape[-1] ** 0.5, key, value, visible)

    monkeypatch.setattr(varlen, "varlen_attn", documented)
    for num_kv in (4, 2):
        q, k, v, _ = make_inputs(BOUNDS[-1], 4, num_kv, 16, seed=71)
        out = varlen.sliding_varlen(q, k, v, bounds=BOUNDS, window=9, softmax_scale=0.3)
        expected = sliding_attention(q, k, v, window=9, cu_seqlens=cu_seqlens(BOUNDS), softmax_scale=0.3, backend="reference")
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_what_has_no_gradient_gets_none():
    inputs = make_inputs(BOUNDS[-1], 4, 2, 8, seed=66)
    assert_fills_nothing_for_no_gradient(sliding("torch", 17), inputs, own=2)  # the sums of dk and dv
