"""Cached generation sees what the uncached function lets the last position see."""

import pytest
import torch

from model.ops.moba import moba_attention, moba_decode, update_block_means
from model.ops.moba.routing import block_layout, block_means
from tests.model.ops.helpers import make_inputs


@pytest.mark.parametrize("num_heads, num_kv", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("block_size, topk", [(8, 3), (8, 1), (5, 4), (1, 2), (200, 2)])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_every_position_of_a_document(num_heads, num_kv, block_size, topk, dtype, atol):
    q, k, v, _ = (x.detach() for x in make_inputs(75, num_heads, num_kv, 16, seed=31, dtype=dtype))
    uncached = moba_attention(q, k, v, block_size=block_size, topk=topk, backend="torch")
    means = None
    for t in range(75):
        means = update_block_means(means, k[: t + 1], block_size=block_size)
        out = moba_decode(q[t], k[: t + 1], v[: t + 1], means, block_size=block_size, topk=topk)
        assert out.dtype == dtype
        torch.testing.assert_close(out, uncached[t], rtol=0, atol=atol)


def test_means_grow_to_the_same_bits_as_in_one_go():
    _, k, _, _ = make_inputs(50, 2, 2, 16, seed=32, dtype=torch.float32)
    step_by_step = None
    for t in range(1, 51):
        step_by_step = update_block_means(step_by_step, k[:t], block_size=8)
        assert step_by_step.shape == (t // 8, 2, 16)
    assert torch.equal(step_by_step, update_block_means(None, k, block_size=8))
    assert torch.equal(step_by_step, block_means(k, block_layout([0, 50], 8))[:6])


def test_a_step_reads_only_the_chosen_blocks():
    """Keys and values that are not chosen may be anything, even NaN; the means alone stand for them."""
    q, k, v, _ = (x.detach() for x in make_inputs(100, 1, 1, 16, seed=33))
    means = update_block_means(None, k, block_size=8)
    expected = moba_decode(q[99], k, v, means, block_size=8, topk=3)
    scores = means[:12, 0] @ q[99, 0]
    hidden = scores.argsort()[:10, None] * 8 + torch.arange(8)
    for x in (k, v):
        x[hidden] = float("nan")
    assert torch.equal(moba_decode(q[99], k, v, means, block_size=8, topk=3), expected)
    assert torch.equal(update_block_means(means, k, block_size=8), means)


def test_wrong_means_are_refused():
    q, k, v, _ = make_inputs(20, 2, 1, 16, seed=34)
    means = update_block_means(None, k, block_size=8)
    with pytest.raises(ValueError, match=r"means has shape \(1, 1, 16\); accepted: \[n, 1, 16\] with n >= 2"):
        moba_decode(q[19], k, v, means[:1], block_size=8, topk=2)
    with pytest.raises(ValueError, match=r"means has shape \(2, 1, 8\)"):
        moba_decode(q[19], k, v, means[..., :8], block_size=8, topk=2)
    with pytest.raises(ValueError, match="block_size=0"):
        update_block_means(None, k, block_size=0)
    with pytest.raises(ValueError, match="topk=0"):
        moba_decode(q[19], k, v, means, block_size=8, topk=0)
