"""The choice of blocks, apart from any output."""

import itertools

import pytest
import torch

from model.ops.moba import routing, select_blocks
from model.ops.moba.reference import seen_blocks
from tests.model.ops.helpers import cu_seqlens, make_inputs


@torch.no_grad()
def chosen_by_definition(q, k, block_size, topk):
    """One query, head and block at a time, in fp64: `[T, Hq, topk-1]` for one document."""
    chosen = torch.full((len(q), q.shape[1], topk - 1), -1)
    for t in range(len(q)):
        for head in range(q.shape[1]):
            keys = k[:, head // (q.shape[1] // k.shape[1])].double()
            scores = [
                (-float(q[t, head].double() @ keys[i * block_size : (i + 1) * block_size].mean(0)), i) for i in range(t // block_size)
            ]
            best = [i for _, i in sorted(scores)[: topk - 1]]
            chosen[t, head, : len(best)] = torch.tensor(best, dtype=torch.int64)
    return chosen


@pytest.mark.parametrize("block_size, topk", [(7, 3), (16, 1), (16, 4), (1, 3), (100, 3)])
def test_definition(block_size, topk):
    bounds = [0, 1, 30, 90]
    q, k, _, _ = make_inputs(bounds[-1], 4, 2, 8, seed=21)
    chosen = select_blocks(q, k, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens(bounds))
    assert not chosen.requires_grad and chosen.dtype == torch.int64
    expected = [chosen_by_definition(q[a:b], k[a:b], block_size, topk) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(chosen, torch.cat(expected))


@pytest.mark.parametrize("budget", [1, 64, 1000, 1 << 22])
def test_chunks_of_any_size_choose_alike(monkeypatch, budget):
    bounds = [0, 3, 4, 5, 120, 121, 300]
    q, k, _, _ = make_inputs(bounds[-1], 4, 2, 8, seed=22)
    settings = {"block_size": 8, "topk": 4, "cu_seqlens": cu_seqlens(bounds)}
    expected = select_blocks(q, k, **settings)
    monkeypatch.setitem(routing._SCORE_BUDGET, "cpu", budget)
    assert torch.equal(select_blocks(q, k, **settings), expected)


def test_ties_go_to_the_lower_block():
    q, k, _, _ = make_inputs(80, 2, 1, 8, seed=23)
    for keys in (torch.zeros_like(k), k[:1].detach().round().expand(80, -1, -1)):  # integers: means and scores are exact
        chosen = select_blocks(q.detach().round(), keys, block_size=8, topk=4)
        own = torch.arange(80)[:, None, None] // 8
        lowest = torch.arange(3).expand(80, 2, 3)
        assert torch.equal(chosen, torch.where(lowest < own, lowest, -1))
        seen = seen_blocks(q.detach().round(), keys.expand(80, 2, 8), block_size=8, topk=4)
        block = torch.arange(10)
        assert torch.equal(seen, ((block < 3) & (block < own) | (block == own)).expand(80, 2, 10))


def test_a_tie_below_a_winner():
    """Scores 1, 5, 1, 1 for topk 3: the winner first, then the lowest of the tied."""
    k = torch.tensor([1.0, 5.0, 1.0, 1.0, 0.0]).repeat_interleave(2)[:, None, None]
    chosen = select_blocks(torch.ones(10, 1, 1), k, block_size=2, topk=3)
    assert chosen[-1, 0].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_flips_near_ties_only(dtype):
    """Where the choice differs from fp64 on the same numbers, the scores differ by at most the stated bound."""
    q, k, _, _ = make_inputs(600, 4, 2, 32, seed=24, dtype=dtype)
    settings = {"block_size": 8, "topk": 4}
    low, exact = select_blocks(q, k, **settings), select_blocks(q.double(), k.double(), **settings)
    means = k.double().view(75, 8, 2, 32).mean(1).repeat_interleave(2, dim=1)
    scores = torch.einsum("qhd,nhd->qhn", q.double(), means)
    assert torch.equal(low < 0, exact < 0)
    gap = (scores.gather(-1, low.clamp(min=0)) - scores.gather(-1, exact.clamp(min=0))).abs()
    # fp32 sums of 8 keys and 32 products: a few units of the last place of |q| |mean|.
    bound = 16 * torch.finfo(torch.float32).eps * q.detach().double().norm(dim=-1).amax() * means.norm(dim=-1).amax()
    assert gap.max() <= bound
    assert (low != exact).float().mean() < 1e-3
