"""The same functions on a CUDA device; skipped where there is none."""

from functools import partial

import pytest
import torch

from model.ops.full import full_attention
from model.ops.moba import moba_attention, moba_decode, update_block_means
from tests.model.ops.helpers import assert_all_close, cu_seqlens, forward_backward, make_inputs

BOUNDS = [0, 1, 40, 41, 600]


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def on_gpu(inputs):
    return [x.detach().cuda().requires_grad_() for x in inputs[:3]] + [inputs[3].cuda()]


@pytest.mark.gpu
@pytest.mark.parametrize("attention, backend", [(partial(moba_attention, block_size=16, topk=4), "torch"), (full_attention, "sdpa")])
def test_equals_reference(attention, backend):
    inputs = make_inputs(BOUNDS[-1], 8, 2, 64, seed=51)
    expected = forward_backward(partial(attention, cu_seqlens=cu_seqlens(BOUNDS), backend="reference"), inputs)
    for bounds in (cu_seqlens(BOUNDS), cu_seqlens(BOUNDS).cuda()):
        results = forward_backward(partial(attention, cu_seqlens=bounds, backend=backend), on_gpu(inputs))
        assert_all_close({name: value.cpu() for name, value in results.items()}, expected, atol=1e-10)


@pytest.mark.gpu
def test_decode_is_the_last_row():
    q, k, v, _ = (x.detach() for x in on_gpu(make_inputs(200, 8, 2, 64, seed=52)))
    means = update_block_means(None, k, block_size=16)
    expected = moba_attention(q, k, v, block_size=16, topk=3)[-1]
    torch.testing.assert_close(moba_decode(q[-1], k, v, means, block_size=16, topk=3), expected, rtol=0, atol=1e-12)
