"""Full causal attention: the sdpa backend against its reference, its guarantees, and its cached form."""

import itertools
from functools import partial

import pytest
import torch

from model.ops.full import full_attention, full_decode
from tests.model.ops.helpers import (
    assert_all_close,
    assert_error_within_twice,
    cu_seqlens,
    forward_backward,
    largest_tensor,
    make_inputs,
    with_dtype,
)

BOUNDS = [0, 1, 64, 129, 130, 300]


def full(backend, bounds=BOUNDS):
    return partial(full_attention, cu_seqlens=cu_seqlens(bounds), backend=backend)


@pytest.mark.parametrize("num_heads, num_kv", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("head_dim", [5, 32, 128])
def test_fp64_equals_reference(num_heads, num_kv, head_dim):
    inputs = make_inputs(BOUNDS[-1], num_heads, num_kv, head_dim, seed=41)
    for backend in ("sdpa", "auto"):
        assert_all_close(forward_backward(full(backend), inputs), forward_backward(full("reference"), inputs), atol=1e-10)


def test_reference_is_the_definition():
    q, k, v, _ = (x.detach() for x in make_inputs(20, 2, 1, 8, seed=42))
    out = full_attention(q, k, v, cu_seqlens=cu_seqlens([0, 7, 20]), softmax_scale=0.3, backend="reference")
    for t, first in ((0, 0), (6, 0), (7, 7), (19, 7)):
        for head in range(2):
            weights = (0.3 * k[first : t + 1, 0] @ q[t, head]).exp()
            torch.testing.assert_close(out[t, head], weights @ v[first : t + 1, 0] / weights.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    low = make_inputs(300, 4, 2, 64, seed=43, dtype=dtype)

    def plain(q, k, v):
        outputs = []
        for start, end in itertools.pairwise(BOUNDS):
            q_doc, k_doc, v_doc = (x[start:end].repeat_interleave(4 // x.shape[1], dim=1).transpose(0, 1) for x in (q, k, v))
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            scores = (q_doc @ k_doc.transpose(1, 2)) * 64**-0.5
            outputs.append((scores.masked_fill(future, float("-inf")).softmax(-1) @ v_doc).transpose(0, 1))
        return torch.cat(outputs)

    exact = forward_backward(full("reference"), with_dtype(low, torch.float64))
    assert_error_within_twice(forward_backward(full("sdpa"), low), forward_backward(plain, low), exact)


@pytest.mark.parametrize("kept", [slice(0, 97), slice(64, 129), slice(130, 220)], ids=str)
def test_unseen_tokens_change_no_bit(kept):
    q, k, v, d_out = make_inputs(300, 4, 2, 32, seed=44, dtype=torch.float32)
    is_kept = torch.zeros(300, 1, 1, dtype=torch.bool)
    is_kept[kept] = True
    loss_on_kept = d_out * is_kept
    noise = torch.Generator().manual_seed(0)
    other = [torch.where(is_kept, x, torch.randn(x.shape, generator=noise)).detach().requires_grad_() for x in (q, k, v)]
    before = forward_backward(full("sdpa"), [q, k, v, loss_on_kept])
    after = forward_backward(full("sdpa"), [*other, loss_on_kept])
    for name in before:
        assert torch.equal(before[name][kept], after[name][kept]), name


@pytest.mark.parametrize("num_heads, num_kv", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("softmax_scale", [None, 0.7])
def test_decode_is_the_last_row(num_heads, num_kv, softmax_scale):
    q, k, v, _ = (x.detach() for x in make_inputs(70, num_heads, num_kv, 16, seed=45))
    uncached = full_attention(q, k, v, softmax_scale=softmax_scale, backend="reference")
    for t in range(70):
        out = full_decode(q[t], k[: t + 1], v[: t + 1], softmax_scale=softmax_scale)
        torch.testing.assert_close(out, uncached[t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_is_linear_in_the_tokens(dtype):
    """With grouped queries too, PyTorch must take a fused kernel, never its quadratic fallback."""
    assert largest_tensor(full_attention, 1024, dtype) <= 2.1 * largest_tensor(full_attention, 512, dtype)


def test_autocast_changes_nothing():
    q, k, v, _ = make_inputs(60, 2, 1, 32, seed=46, dtype=torch.float32)
    expected, last = full_attention(q, k, v), full_decode(q[-1], k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full_attention(q, k, v), expected)
        assert torch.equal(full_decode(q[-1], k, v), last)
