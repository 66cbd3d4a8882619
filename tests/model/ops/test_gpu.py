"""The same functions on a CUDA device; skipped where there is none."""

from functools import partial

import pytest
import torch

from model.ops.full import full_attention
from model.ops.moba import moba_attention, moba_decode, update_block_means
from model.ops.sliding import sliding_attention
from model.ops.sliding.varlen import refusal
from tests.model.ops.helpers import (
    assert_all_close,
    assert_error_within_twice,
    cu_seqlens,
    forward_backward,
    make_inputs,
    plain_attention,
    with_dtype,
)

BOUNDS = [0, 1, 40, 41, 600]


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def on_gpu(inputs):
    return [x.detach().cuda().requires_grad_() for x in inputs[:3]] + [inputs[3].cuda()]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "attention, backend",
    [
        (partial(moba_attention, block_size=16, topk=4), "torch"),
        (full_attention, "sdpa"),
        (partial(sliding_attention, window=70), "torch"),
    ],
)
def test_equals_reference(attention, backend):
    inputs = make_inputs(BOUNDS[-1], 8, 2, 64, seed=51)
    expected = forward_backward(partial(attention, cu_seqlens=cu_seqlens(BOUNDS), backend="reference"), inputs)
    for bounds in (cu_seqlens(BOUNDS), cu_seqlens(BOUNDS).cuda()):
        results = forward_backward(partial(attention, cu_seqlens=bounds, backend=backend), on_gpu(inputs))
        assert_all_close({name: value.cpu() for name, value in results.items()}, expected, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv", [8, 2])
@pytest.mark.parametrize("window", [1, 70, 559])
def test_sliding_varlen_is_no_further_off_than_plain_torch(window, num_kv):
    low = on_gpu(make_inputs(BOUNDS[-1], 8, num_kv, 64, seed=53, dtype=torch.bfloat16))
    reason = refusal(low[0])
    if reason:
        pytest.skip(reason)
    run = partial(sliding_attention, window=window, cu_seqlens=cu_seqlens(BOUNDS))
    exact = forward_backward(partial(run, backend="reference"), with_dtype(low, torch.float64))
    position = torch.arange(BOUNDS[-1], device="cuda")
    document = torch.bucketize(position, torch.tensor(BOUNDS[1:], device="cuda"), right=True)
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < window) & (document[:, None] == document)
    plain = forward_backward(partial(plain_attention, visible=visible), low)
    assert_error_within_twice(forward_backward(partial(run, backend="varlen"), low), plain, exact)


@pytest.mark.gpu
def test_decode_is_the_last_row():
    q, k, v, _ = (x.detach() for x in on_gpu(make_inputs(200, 8, 2, 64, seed=52)))
    means = update_block_means(None, k, block_size=16)
    expected = moba_attention(q, k, v, block_size=16, topk=3)[-1]
    torch.testing.assert_close(moba_decode(q[-1], k, v, means, block_size=16, topk=3), expected, rtol=0, atol=1e-12)
