"""What follows from the definition of MoBA: topk 1, topk over everything, no influence from what is not seen, memory."""

import itertools
from functools import partial

import pytest
import torch

from model.ops.full import full_attention
from model.ops.moba import moba_attention, routing, tiles
from model.ops.moba.blocked import moba_blocked
from tests.model.ops.helpers import assert_all_close, cu_seqlens, forward_backward, largest_tensor, make_inputs

BOUNDS = [0, 1, 50, 210, 217, 400]


def sparse(q, k, v, *, bounds, block_size, topk):
    return moba_blocked(q, k, v, bounds=bounds, block_size=block_size, topk=topk, softmax_scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_topk_1_is_attention_inside_the_own_block(backend):
    inputs = make_inputs(BOUNDS[-1], 4, 2, 32, seed=11)
    # Every block as a document of its own, through full attention.
    blocks = sorted({*BOUNDS, *(t for start, end in itertools.pairwise(BOUNDS) for t in range(start, end, 16))})
    expected = forward_backward(partial(full_attention, cu_seqlens=cu_seqlens(blocks), backend="reference"), inputs)
    moba = partial(moba_attention, block_size=16, topk=1, cu_seqlens=cu_seqlens(BOUNDS), backend=backend)
    assert_all_close(forward_backward(moba, inputs), expected, atol=1e-12)


@pytest.mark.parametrize("block_size, topk", [(16, 12), (61, 3), (183, 1), (200, 1), (1, 183)])
def test_topk_over_the_longest_document_is_full_attention(block_size, topk):
    assert block_size * topk >= max(end - start for start, end in itertools.pairwise(BOUNDS))
    inputs = make_inputs(BOUNDS[-1], 4, 2, 32, seed=12)
    expected = forward_backward(partial(full_attention, cu_seqlens=cu_seqlens(BOUNDS), backend="reference"), inputs)
    without_hand_over = partial(sparse, bounds=BOUNDS, block_size=block_size, topk=topk)
    assert_all_close(forward_backward(without_hand_over, inputs), expected, atol=1e-12)
    for backend in ("reference", "torch", "auto"):
        moba = partial(moba_attention, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens(BOUNDS), backend=backend)
        assert_all_close(forward_backward(moba, inputs), expected, atol=1e-12)


def test_hand_over_starts_exactly_where_the_functions_agree():
    q, k, v, _ = make_inputs(97, 2, 1, 16, seed=13)
    full = full_attention(q, k, v)
    assert torch.equal(moba_attention(q[:96], k[:96], v[:96], block_size=32, topk=3), full[:96])
    one_token_more = moba_attention(q, k, v, block_size=32, topk=3)
    assert not torch.equal(one_token_more[96], full[96])


def random_case(trial: int):
    """Inputs, settings, and the tokens whose results must not feel the others."""
    generator = torch.Generator().manual_seed(trial)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    bounds = pick([[0, 400], BOUNDS, [0, 150, 391]])
    num_kv, group, dtype = pick([1, 2]), pick([1, 4]), pick([torch.float32, torch.float64, torch.bfloat16])
    inputs = make_inputs(bounds[-1], num_kv * group, num_kv, pick([32, 33, 64]), seed=trial, dtype=dtype)
    settings = {"bounds": bounds, "block_size": pick([3, 16, 31, 64]), "topk": pick([1, 2, 3, 9])}
    token = torch.arange(bounds[-1])
    document = pick(list(itertools.pairwise(bounds)))
    if pick(["future", "document"]) == "future" or len(bounds) == 2:
        kept = token < int(torch.randint(1, bounds[-1], (1,), generator=generator))
    else:
        kept = (token >= document[0]) & (token < document[1])
    return inputs, settings, kept, generator


@pytest.mark.parametrize("trial", range(40))
def test_unseen_tokens_change_no_bit(trial):
    """Future tokens and other documents: every output and gradient of a loss on the kept tokens is bitwise the same."""
    (q, k, v, d_out), settings, kept, generator = random_case(trial)
    loss_on_kept = d_out * kept[:, None, None]
    scale = [0.1, 1.0, 10.0][trial % 3]

    def disturbed(x):
        noise = scale * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        return torch.where(kept[:, None, None], x, x + noise).detach().requires_grad_()

    before = forward_backward(partial(sparse, **settings), [q, k, v, loss_on_kept])
    after = forward_backward(partial(sparse, **settings), [disturbed(q), disturbed(k), disturbed(v), loss_on_kept])
    for name in before:
        assert torch.equal(before[name][kept], after[name][kept]), name
    for name in ("d_q", "d_k", "d_v"):
        assert not before[name][~kept].any() and not after[name][~kept].any(), name


def test_non_finite_values_stay_in_their_document():
    q, k, v, _ = make_inputs(BOUNDS[-1], 4, 2, 32, seed=14)
    settings = {"bounds": BOUNDS, "block_size": 16, "topk": 2}
    poisoned = [x.detach().clone() for x in (q, k, v)]
    for x in poisoned:
        x[50:210] = float("nan")
    out = sparse(*poisoned, **settings)
    assert out[50:210].isnan().all()
    clean = torch.ones(BOUNDS[-1], dtype=torch.bool)
    clean[50:210] = False
    assert torch.equal(out[clean], sparse(q, k, v, **settings).detach()[clean])


def test_runs_repeat_to_the_bit():
    torch.use_deterministic_algorithms(False)  # as a user runs it
    inputs = make_inputs(400, 4, 1, 64, seed=15, dtype=torch.float32)
    first, second = (forward_backward(partial(sparse, bounds=[0, 400], block_size=16, topk=4), inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_memory_is_linear_in_the_tokens(monkeypatch):
    """With small chunk budgets nothing hides a quadratic term: twice the tokens, at most twice the largest tensor."""
    monkeypatch.setitem(routing._SCORE_BUDGET, "cpu", 1 << 12)
    monkeypatch.setitem(tiles._CHUNK_BUDGET, "cpu", 1 << 12)
    moba = partial(moba_attention, block_size=16, topk=3, backend="torch")
    sizes = [largest_tensor(moba, num_tokens) for num_tokens in (512, 1024, 2048)]
    assert sizes[1] <= 2.1 * sizes[0] and sizes[2] <= 2.1 * sizes[1]
    # The measure sees what it should: the specification's scores grow fourfold.
    reference = partial(moba_attention, block_size=16, topk=3, backend="reference")
    assert largest_tensor(reference, 1024) >= 3.9 * largest_tensor(reference, 512)


def test_saved_for_backward_is_linear_in_the_tokens():
    def saved(num_tokens):
        q, k, v, _ = make_inputs(num_tokens, 2, 1, 16, seed=17, dtype=torch.float32)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            moba_attention(q, k, v, block_size=16, topk=3, backend="torch")
        return sum(sizes)

    assert 0 < saved(1024) <= 2 * saved(512)
