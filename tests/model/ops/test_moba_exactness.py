"""The torch backend against the specification: outputs and every gradient, in fp64, fp32 and bf16."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops.moba import moba_attention, select_blocks
from model.ops.moba.blocked import moba_blocked
from model.ops.moba.reference import moba_reference
from tests.model.ops.helpers import (
    assert_all_close,
    assert_error_within_twice,
    assert_fills_nothing_for_no_gradient,
    assert_largest_error_within_twice,
    cu_seqlens,
    forward_backward,
    make_inputs,
    plain_attention,
    visible_tokens,
    with_dtype,
)

# bounds, Hq, Hkv, D, block_size, topk
CASES = {
    "one token": ([0, 1], 4, 1, 64, 16, 3),
    "63 tokens": ([0, 63], 4, 4, 32, 16, 3),
    "64 tokens": ([0, 64], 4, 1, 32, 16, 2),
    "65 tokens": ([0, 65], 4, 1, 64, 16, 3),
    "odd everything": ([0, 131], 3, 1, 5, 7, 4),
    "head dimension 128, tail block": ([0, 530], 2, 2, 128, 64, 3),
    "about 1000 tokens, grouped queries": ([0, 1003], 4, 1, 32, 64, 4),
    "documents, some of one token, some below a block": ([0, 1, 40, 41, 42, 200, 333, 334], 4, 2, 32, 16, 3),
    "topk 1": ([0, 90, 201], 4, 1, 32, 16, 1),
    "topk beyond the number of blocks": ([0, 5, 100], 2, 1, 32, 16, 50),
    "blocks of one token": ([0, 70], 2, 1, 32, 1, 5),
    "block longer than a tile": ([0, 700], 2, 1, 32, 200, 2),
    "several tiles per list": ([0, 640], 4, 1, 32, 128, 4),
}


def both(bounds, block_size, topk, head_dim):
    """The sparse path itself, before any hand-over, and the specification."""
    settings = {"bounds": bounds, "block_size": block_size, "topk": topk, "softmax_scale": head_dim**-0.5}
    return partial(moba_blocked, **settings), partial(moba_reference, **settings)


@pytest.mark.parametrize("case", CASES)
def test_fp64_equals_reference(case):
    bounds, num_heads, num_kv, head_dim, block_size, topk = CASES[case]
    inputs = make_inputs(bounds[-1], num_heads, num_kv, head_dim, seed=1)
    sparse, reference = both(bounds, block_size, topk, head_dim)
    assert_all_close(forward_backward(sparse, inputs), forward_backward(reference, inputs), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][0][-1] > 1])
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype):
    bounds, num_heads, num_kv, head_dim, block_size, topk = CASES[case]
    low = make_inputs(bounds[-1], num_heads, num_kv, head_dim, seed=2, dtype=dtype)
    high = with_dtype(low, torch.float64)
    sparse, reference = both(bounds, block_size, topk, head_dim)
    route = partial(select_blocks, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens(bounds))
    # The premise of the comparison: on these inputs rounding flips no choice.
    assert torch.equal(route(*low[:2]), route(*high[:2]))

    plain = partial(plain_attention, visible=visible_tokens(*high[:2], bounds, block_size, topk))
    results = [forward_backward(sparse, low), forward_backward(plain, low), forward_backward(reference, high)]
    assert_error_within_twice(*results)
    assert_largest_error_within_twice(*results)


def test_groups_of_heads_give_the_same_bits(monkeypatch):
    inputs = make_inputs(150, 6, 3, 32, seed=6, dtype=torch.float32)
    sparse, _ = both([0, 150], 16, 3, 32)
    expected = forward_backward(sparse, inputs)
    for kv_heads in (1, 2):
        monkeypatch.setattr("model.ops.moba.blocked.WORKSPACE_BUDGET", kv_heads * 150 * 2 * 32 * 3)
        for name, value in forward_backward(sparse, inputs).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_changes_nothing(backend):
    q, k, v, d_out = make_inputs(100, 2, 1, 32, seed=7, dtype=torch.float32)
    attention = partial(moba_attention, block_size=16, topk=2, backend=backend)
    expected = attention(q, k, v)
    grads = torch.autograd.grad(expected, (q, k, v), d_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v)
        chosen = select_blocks(q, k, block_size=16, topk=2)
        if backend == "torch":  # the reference's backward is autograd's, in the caller's hands
            for grad, other in zip(grads, torch.autograd.grad(out, (q, k, v), d_out)):
                assert torch.equal(grad, other)
    assert torch.equal(out, expected)
    assert torch.equal(chosen, select_blocks(q, k, block_size=16, topk=2))


def test_non_contiguous_inputs_give_the_same_bits():
    q, k, v, d_out = make_inputs(150, 4, 2, 32, seed=3, dtype=torch.float32)
    attention = partial(moba_attention, block_size=16, topk=3, backend="torch")
    expected = forward_backward(attention, [q, k, v, d_out])
    # Heads before tokens in memory, and every other element of a wider tensor.
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    wide = torch.stack([d_out, torch.full_like(d_out, float("nan"))], dim=-1)[..., 0]
    assert not any(x.is_contiguous() for x in (*strided, wide))
    for name, value in forward_backward(attention, [*strided, wide]).items():
        assert torch.equal(value, expected[name]), name


def test_softmax_scale_scales_scores_only():
    inputs = make_inputs(200, 4, 2, 32, seed=4)
    run = partial(moba_attention, block_size=16, topk=3)
    by_scale = forward_backward(partial(run, softmax_scale=0.5, backend="torch"), inputs)
    assert_all_close(by_scale, forward_backward(partial(run, softmax_scale=0.5, backend="reference"), inputs), atol=1e-10)
    # Scaling q scales all gate scores alike, so it leaves the choice and acts as the scale does.
    scaled_q = run(inputs[0] * 0.5, *inputs[1:3], softmax_scale=1.0, backend="torch")
    torch.testing.assert_close(by_scale["out"], scaled_q.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_of_output_and_gradients(dtype):
    inputs = make_inputs(40, 2, 1, 32, seed=5, dtype=dtype)
    for backend in ("reference", "torch", "auto"):
        results = forward_backward(partial(moba_attention, block_size=8, topk=2, backend=backend), inputs)
        assert {value.dtype for value in results.values()} == {dtype}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    num_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 4, 9, 16]),
    block_size=st.integers(1, 20),
    topk=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_any_partition_into_documents(lengths, num_kv, group, head_dim, block_size, topk, seed):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = make_inputs(bounds[-1], num_kv * group, num_kv, head_dim, seed=seed)
    sparse, reference = both(bounds, block_size, topk, head_dim)
    expected = forward_backward(reference, inputs)
    assert_all_close(forward_backward(sparse, inputs), expected, atol=1e-10)
    door = partial(moba_attention, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens(bounds), backend="torch")
    assert_all_close(forward_backward(door, inputs), expected, atol=1e-10)


def test_what_has_no_gradient_gets_none():
    sparse, _ = both([0, 30, 100], 16, 3, 16)
    assert_fills_nothing_for_no_gradient(sparse, make_inputs(100, 2, 1, 16, seed=2))
