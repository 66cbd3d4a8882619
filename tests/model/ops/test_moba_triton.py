"""The Triton backend against the specification: in Triton's interpreter in fp32 on the CPU, compiled in bf16 and fp16 on a GPU."""

import itertools
from dataclasses import dataclass
from functools import lru_cache, partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from configs.schema import RopeConfig
from model.activations import run_layer
from model.host_memory import HostMemory
from model.ops.moba import moba_attention, select_blocks
from model.ops.moba.reference import moba_reference
from model.ops.moba.triton import gate, operator, plan, schedule
from model.rope import rotary_table, rotate
from tests.model.helpers import build, pack, tiny_config
from tests.model.ops.helpers import (
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
from tests.model.ops.interpreter import dot_by_row, scan_by_doubling, sort

# What the interpreter computes only to mask may overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

WORKSPACE = 1 << 30
# Two scores are a near-tie, which the gate may decide either way (see `gate.choose_blocks`), where they differ by less than |q| times these
# parts of their own means' norm, twice what the halves of two means leave out, and of the longest past mean's, means less the centre.
NEAR_TIE, STEP = 2.0**-16, 2.0**-20


@dataclass(frozen=True, kw_only=True)
class Target:
    device: str
    dtype: torch.dtype

    def inputs(self, *sizes: int, seed: int) -> list[torch.Tensor]:
        """As `make_inputs`: q, k, v and the gradient that a loss sends back."""
        *leaves, d_out = make_inputs(*sizes, seed=seed, dtype=self.dtype)
        return [*(x.detach().to(self.device).requires_grad_() for x in leaves), d_out.to(self.device)]


@pytest.fixture(
    params=[
        pytest.param(Target(device="cpu", dtype=torch.float32), id="interpreted"),
        pytest.param(Target(device="cuda", dtype=torch.bfloat16), id="bf16", marks=pytest.mark.gpu),
        pytest.param(Target(device="cuda", dtype=torch.float16), id="fp16", marks=pytest.mark.gpu),
    ]
)
def target(request, monkeypatch):
    """Where the kernels run, and in which dtype."""
    if request.param.device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    else:
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled for the CUDA device")
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # the backend takes CPU tensors and fp32 then
        monkeypatch.setattr("triton.language.sort", sort)
        monkeypatch.setattr(interpreter.ScanOps, "generic_scan", scan_by_doubling)
    return request.param


def moba(q, k, v, *, bounds, block_size, topk, workspace=WORKSPACE):
    """The backend by its public door; what the door would hand to full attention goes to the kernels all the same."""
    sizes = {"block_size": block_size, "topk": topk, "workspace": workspace}
    if block_size * topk < max(end - start for start, end in itertools.pairwise(bounds)):
        return moba_attention(q, k, v, cu_seqlens=cu_seqlens(bounds), backend="triton", **sizes)
    return operator.moba_triton(q, k, v, cu_seqlens(bounds), softmax_scale=q.shape[-1] ** -0.5, **sizes)


def kernel_choice(q, k, *, bounds, **sizes):
    """The choice of the gate's kernel: int64 `[T, Hq, topk-1]`, in no order."""
    return select_blocks(q, k, cu_seqlens=cu_seqlens(bounds), backend="triton", **sizes)


def gate_scores(q, k, *, bounds, block_size):
    """Per document, in fp64: scores `[L, Hq, n]`, -inf where a block is not past, and |mean - centre| of its blocks `[Hq, n]`."""
    group = q.shape[1] // k.shape[1]
    for start, end in itertools.pairwise(bounds):
        keys = k[start:end].detach().double().repeat_interleave(group, dim=1)
        means = torch.stack([block.mean(0) for block in keys.split(block_size)])  # [n, Hq, D]
        own = torch.arange(end - start, device=q.device)[:, None, None] // block_size
        scores = torch.einsum("qhd,nhd->qhn", q[start:end].detach().double(), means)
        norms = (means - means[:2][-1]).norm(dim=-1).t()
        yield scores.masked_fill(torch.arange(len(means), device=q.device) >= own, float("-inf")), norms


def without_near_ties(inputs, *, bounds, block_size, topk):
    """The inputs, with each query drawn anew whose choice hangs on a near-tie: the choice is then one, whatever the rounding."""
    q, k, *rest = inputs
    q = q.detach().clone()
    generator = torch.Generator().manual_seed(len(q))
    while True:
        near = []
        for (start, end), (scores, norms) in zip(itertools.pairwise(bounds), gate_scores(q, k, bounds=bounds, block_size=block_size)):
            best = scores.topk(min(topk, scores.shape[-1]), dim=-1).values
            lowest_in, highest_out = best[..., topk - 2 : topk - 1], best[..., topk - 1 : topk]
            bound = 2 * (NEAR_TIE + STEP) * q[start:end].double().norm(dim=-1) * norms.amax(-1)
            near.append((lowest_in - highest_out < bound[..., None]).any(-1) if topk > 1 else torch.zeros_like(bound, dtype=torch.bool))
        near = torch.cat(near)
        if not near.any():
            return [q.requires_grad_(), k, *rest]
        q[near] = torch.randn(int(near.sum()), q.shape[-1], generator=generator).to(q)


def assert_exact(inputs, *, bounds, block_size, topk, run=moba):
    """Output and every gradient are at most twice as far from the specification in fp64 as plain torch of the same dtype.

    In root mean square and in the worst element; plain torch is given the blocks to see.
    """
    sizes = {"bounds": bounds, "block_size": block_size, "topk": topk}
    inputs = without_near_ties(inputs, **sizes)
    high = with_dtype(inputs, torch.float64)
    plain = partial(plain_attention, visible=visible_tokens(*high[:2], bounds, block_size, topk))
    reference = partial(moba_reference, softmax_scale=inputs[0].shape[-1] ** -0.5, **sizes)
    results = [forward_backward(partial(run, **sizes), inputs), forward_backward(plain, inputs), forward_backward(reference, high)]
    assert_error_within_twice(*results)
    assert_largest_error_within_twice(*results)


def assert_same_bits(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# bounds, Hq, Hkv, D, block_size, topk
DOCUMENTS = [0, 1, 40, 41, 42, 200, 333, 334]
CASES = {
    "63 tokens": ([0, 63], 1, 1, 64, 64, 1),
    "64 tokens, topk 1, groups of 4": ([0, 64], 4, 1, 128, 64, 1),
    "65 tokens, topk 1": ([0, 65], 2, 2, 64, 64, 1),
    "65 tokens, the past is one block, groups of 8": ([0, 65], 8, 1, 64, 64, 2),
    "documents, some of one token, some below a block, groups of 4": (DOCUMENTS, 4, 1, 64, 64, 2),
    "topk beyond the number of blocks": ([0, 5, 200], 2, 1, 64, 64, 10),
    "1000 tokens": ([0, 1000], 2, 1, 64, 64, 3),
    "1000 tokens, head dimension 128, blocks of one tile": ([0, 1000], 1, 1, 128, 128, 4),
    "blocks of several tiles, documents": ([0, 450, 451, 700], 2, 2, 64, 192, 2),
    "blocks of several tiles, head dimension 128": ([0, 700], 1, 1, 128, 256, 2),
    "blocks of 512": ([0, 1100], 1, 1, 64, 512, 2),
    "4097 tokens": ([0, 4097], 1, 1, 64, 128, 2),
}
LARGE_CASES = {
    "4097 tokens, groups of 8": ([0, 4097], 16, 2, 128, 64, 8),
    "4097 tokens, topk 64": ([0, 4097], 4, 4, 64, 64, 64),
    "many documents": ([0, *range(1, 4097, 372), 4097], 8, 2, 128, 128, 3),
    "blocks of 128": ([0, 4097], 8, 8, 128, 128, 8),
    "blocks of 320": ([0, 1500, 4097], 8, 2, 64, 320, 3),
    "blocks of 512": ([0, 1, 4097], 8, 1, 128, 512, 3),
    "blocks of 2048": ([0, 6500], 4, 1, 128, 2048, 2),
    "blocks of 4096, topk beyond the number of blocks": ([0, 500, 9000], 2, 1, 64, 4096, 12),
}


@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_that_of_plain_torch(case, target):
    bounds, num_heads, num_kv, head_dim, block_size, topk = CASES[case]
    inputs = target.inputs(bounds[-1], num_heads, num_kv, head_dim, seed=61)
    assert_exact(inputs, bounds=bounds, block_size=block_size, topk=topk)


@pytest.mark.parametrize("case", LARGE_CASES)
def test_error_is_at_most_twice_that_of_plain_torch_at_length(case, target):
    if target.device == "cpu":
        pytest.skip("minutes in the interpreter")
    bounds, num_heads, num_kv, head_dim, block_size, topk = LARGE_CASES[case]
    inputs = target.inputs(bounds[-1], num_heads, num_kv, head_dim, seed=62)
    assert_exact(inputs, bounds=bounds, block_size=block_size, topk=topk)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_token_is_its_value(head_dim, target):
    q, k, v, d_out = target.inputs(1, 4, 1, head_dim, seed=63)
    results = forward_backward(partial(moba, bounds=[0, 1], block_size=64, topk=3), [q, k, v, d_out])
    assert torch.equal(results["out"], v.expand(1, 4, head_dim))
    by_group = d_out.double().sum(1, keepdim=True)
    torch.testing.assert_close(results["d_v"].double(), by_group, rtol=2 * torch.finfo(target.dtype).eps, atol=1e-5)
    # Softmax of one score has no gradient: what is left is the difference of two fp32 sums of D products, <d_out, v> and <d_out, out>.
    left = head_dim * torch.finfo(torch.float32).eps * (d_out * v).abs().sum(-1).max() * 4 * max(q.abs().max(), k.abs().max())
    assert results["d_q"].abs().max() <= left and results["d_k"].abs().max() <= left


def assert_only_near_ties_differ(q, k, *, bounds, block_size, topk):
    """The kernel's choice is that of fp64, but for near-ties; returns the share of its choices that differ."""
    sizes = {"bounds": bounds, "block_size": block_size}
    chosen = kernel_choice(q, k, topk=topk, **sizes)
    exact = select_blocks(q.double(), k.double(), block_size=block_size, topk=topk, cu_seqlens=cu_seqlens(bounds))
    num_different = num_chosen = 0
    for (start, end), (scores, norms) in zip(itertools.pairwise(bounds), gate_scores(q, k, **sizes)):
        ours, theirs = (is_chosen(x[start:end], scores.shape[-1]) for x in (chosen, exact))
        assert torch.equal(ours.sum(-1), theirs.sum(-1))  # as many, each once
        assert not (ours & scores.isinf()).any()  # past blocks alone
        worst_taken = scores.masked_fill(~ours | theirs, float("inf")).amin(-1)
        best_missed = scores.masked_fill(~theirs | ours, float("-inf")).amax(-1)
        norm = norms.masked_fill(~(ours ^ theirs), 0).amax(-1)
        longest = norms.masked_fill(scores.isinf(), 0).amax(-1)
        differs = (ours ^ theirs).any(-1)
        bound = q[start:end].double().norm(dim=-1) * (NEAR_TIE * norm + STEP * longest)
        assert (best_missed - worst_taken < bound)[differs].all()
        num_different, num_chosen = num_different + int((ours & ~theirs).sum()), num_chosen + int(ours.sum())
    return num_different / num_chosen


def is_chosen(chosen, num_blocks):
    """bool `[L, Hq, n]`."""
    ones = torch.zeros(*chosen.shape[:2], num_blocks + 1, dtype=torch.bool, device=chosen.device)
    return ones.scatter_(-1, torch.where(chosen >= 0, chosen, num_blocks), True)[..., :-1]


@pytest.mark.parametrize("block_size, topk", [(64, 4), (128, 2), (192, 3)])
def test_choice_is_that_of_fp64(block_size, topk, target):
    bounds = [0, 1, 100, 900, 965, 1900]
    q, k, *_ = target.inputs(bounds[-1], 2, 1, 64, seed=64)
    assert_only_near_ties_differ(q, k, bounds=bounds, block_size=block_size, topk=topk)


@pytest.mark.parametrize("bounds, topk", [([0, 60], 3), ([0, 130, 200], 1), ([0, 130, 200], 9)])
def test_choice_without_a_choice_is_all_there_is(bounds, topk, target):
    q, k, *_ = target.inputs(bounds[-1], 2, 1, 64, seed=85)
    chosen = kernel_choice(q, k, bounds=bounds, block_size=64, topk=topk).sort(dim=-1, descending=True).values
    exact = select_blocks(q, k, block_size=64, topk=topk, cu_seqlens=cu_seqlens(bounds)).sort(dim=-1, descending=True).values
    assert chosen.shape == exact.shape and torch.equal(chosen, exact)


def test_choice_differs_in_fewer_than_one_of_10000(target):
    if target.device == "cpu":
        pytest.skip("minutes in the interpreter")
    for block_size, topk, head_dim in [(64, 8, 64), (64, 16, 128), (128, 8, 128), (512, 3, 128)]:
        q, k, *_ = target.inputs(32768, 8, 2, head_dim, seed=65)
        share = assert_only_near_ties_differ(q, k, bounds=[0, 32768], block_size=block_size, topk=topk)
        print(f"B={block_size} topk={topk} D={head_dim} {target.dtype}: {share:.1e} of the choices differ from fp64")
        assert share < 1e-4


def trained_inputs(target, bounds, *, common, sink, seed):
    """q `[T, 2, 64]` and k `[T, 1, 64]` that are made as a trained model's are, of numbers that bf16 has.

    All keys share a vector of norm `common`, which queries seek, in the pairs that rotary positions turn slowest; what is read changes
    in steps of 100 tokens; and the first key of each document is a sink, further along that vector by `sink`.
    """
    q, k, *_ = (x.detach() for x in target.inputs(bounds[-1], 2, 1, 64, seed=seed))
    topic, direction, *_ = (x.detach() for x in target.inputs(bounds[-1] // 100 + 1, 1, 1, 64, seed=seed + 1))
    shared = direction[0] * (torch.arange(64, device=target.device) % 32 >= 24)
    shared /= shared.norm()
    k += common * shared + topic.repeat_interleave(100, dim=0)[: len(k)]
    k[bounds[:-1]] += sink * shared
    q += 8 * shared
    position = torch.cat([torch.arange(end - start, device=target.device) for start, end in itertools.pairwise(bounds)])
    table = rotary_table(position, 64, RopeConfig(theta=1e6))
    return [rotate(x, table).bfloat16().to(target.dtype) for x in (q, k)]


@pytest.mark.parametrize("common, sink", [(0, 1000), (100, 1000), (1000, 0)])
def test_choice_is_that_of_fp64_on_inputs_as_trained(common, sink, target):
    sizes = {"bounds": [0, 700, 3500] if target.device == "cpu" else [0, 3500, 32768], "block_size": 64, "topk": 4}
    share = assert_only_near_ties_differ(*trained_inputs(target, sizes["bounds"], common=common, sink=sink, seed=86), **sizes)
    print(f"common {common}, sink {sink}, {target.dtype}: {share:.1e} of the choices differ from fp64")
    assert share < 1e-4


def test_what_the_gate_keeps_of_blocks_hangs_on_no_later_key(target):
    """From the second block of a document on: queries before its end have no choice."""
    _, k, *_ = (x.detach() for x in target.inputs(400, 1, 2, 64, seed=88))
    disturbed = k.clone()
    disturbed[198:] *= 10
    before, after = (gate.block_means(plan.call_of(x, x, (0, 70, 400), block_size=64, topk=2, softmax_scale=1, workspace=WORKSPACE), x)
                     for x in (k, disturbed))  # fmt: skip
    for kept in ("high", "low", "norm"):
        assert torch.equal(getattr(before, kept)[:, :4], getattr(after, kept)[:, :4]), kept
    assert not torch.equal(before.high[:, 4:], after.high[:, 4:])


def test_means_as_far_apart_as_the_dtype_allows(target):
    """Blocks of one key each time, up to near the largest number of fp16 on either side of zero: the choice is in their order."""
    q = torch.ones(320, 1, 64, device=target.device, dtype=target.dtype)
    k = torch.tensor([60000.0, -60000, 50000, -50000, 0]).to(q).repeat_interleave(64)[:, None, None].expand(-1, 1, 64)
    chosen = kernel_choice(q, k, bounds=[0, 320], block_size=64, topk=3)
    assert torch.equal(is_chosen(chosen[256:], 5), torch.tensor([True, False, True, False, False], device=q.device).expand(64, 1, 5))


def test_tied_blocks_are_taken_from_the_first(target):
    """Integers, so that means and scores are exact, few values, so that most are tied, and more blocks than a tile of the gate has."""
    generator = torch.Generator().manual_seed(66)
    q = torch.randint(-1, 2, (70 * 64, 1, 64), generator=generator).to(target.device, target.dtype)
    q[:, :, 4:] = 0
    k = torch.randint(-1, 2, (70, 1, 64), generator=generator).to(target.device, target.dtype).repeat_interleave(64, dim=0)
    for keys in (k, torch.zeros_like(k)):
        exact = select_blocks(q.double(), keys.double(), block_size=64, topk=5)
        chosen = kernel_choice(q, keys, bounds=[0, len(q)], block_size=64, topk=5)
        assert torch.equal(is_chosen(chosen, 70), is_chosen(exact, 70))


def fused(q, k, v):
    """Views of one projection's output."""
    return torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).split([x[0].numel() for x in (q, k, v)], dim=1)


def heads_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]


def one_element_on(x):
    """The same in memory that begins one element later, on no 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "fused": lambda q, k, v: [x.view(y.shape) for x, y in zip(fused(q, k, v), (q, k, v))],
    "heads first": lambda q, k, v: [heads_first(x) for x in (q, k, v)],
    "keys further apart than values": lambda q, k, v: [q, torch.cat((k, v), dim=1)[:, : k.shape[1]], v],
    "every other element": lambda q, k, v: [every_other(x) for x in (q, k, v)],
    "unaligned": lambda q, k, v: [one_element_on(x) for x in (q, k, v)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens, block_size", [(140, 64), (200, 192)])
def test_layout_in_memory_changes_no_bit(layout, num_tokens, block_size, target):
    q, k, v, d_out = target.inputs(num_tokens, 2, 2, 64, seed=67)
    run = partial(moba, bounds=[0, num_tokens], block_size=block_size, topk=2)
    expected = forward_backward(run, [q, k, v, d_out])
    strided = [x.detach() for x in LAYOUTS[layout](q, k, v)]
    assert layout == "unaligned" or not strided[1].is_contiguous()
    assert_same_bits(forward_backward(run, [*(x.requires_grad_() for x in strided), d_out]), expected)


def test_layout_of_the_upstream_gradient_changes_no_bit(target):
    q, k, v, d_out = target.inputs(140, 2, 1, 64, seed=68)
    out = moba(q, k, v, bounds=[0, 140], block_size=64, topk=2)
    backward = partial(torch.autograd.grad, out, (q, k, v), retain_graph=True)
    everywhere_one = d_out.new_ones(()).expand_as(d_out)  # of a sum
    every_token_alike = d_out[:1].expand_as(d_out)
    for strided in (heads_first(d_out), every_other(d_out), one_element_on(d_out), everywhere_one, every_token_alike):
        assert strided.storage_offset() or not strided.is_contiguous()
        for grad, expected in zip(backward(strided), backward(strided.clone(memory_format=torch.contiguous_format))):
            assert torch.equal(grad, expected)


# bounds, block_size, topk, the tokens whose results must not feel the others
UNSEEN = {
    "the future": ([0, 330], 64, 2, range(150)),
    "the future, blocks of several tiles": ([0, 420], 192, 2, range(400)),
    "the future, the first token": ([0, 200], 64, 2, range(1)),
    "other documents": ([0, 70, 250, 251, 330], 64, 2, range(70, 250)),
    "other documents, blocks of several tiles": ([0, 10, 250, 300], 192, 2, range(10, 250)),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_unseen_tokens_change_no_bit(case, target):
    """Every output, and every gradient of a loss on the kept tokens."""
    bounds, block_size, topk, kept_range = UNSEEN[case]
    q, k, v, d_out = target.inputs(bounds[-1], 2, 1, 64, seed=69)
    kept = torch.zeros(bounds[-1], dtype=torch.bool, device=target.device)
    kept[kept_range.start : kept_range.stop] = True
    others = target.inputs(bounds[-1], 2, 1, 64, seed=70)
    disturbed = [torch.where(kept[:, None, None], x, 10 * y).detach().requires_grad_() for x, y in zip((q, k, v), others)]
    run, loss_on_kept = partial(moba, bounds=bounds, block_size=block_size, topk=topk), d_out * kept[:, None, None]
    before, after = (forward_backward(run, [*x, loss_on_kept]) for x in ((q, k, v), disturbed))
    for name, value in before.items():
        assert torch.equal(value[kept], after[name][kept]), name
    for name in ("d_q", "d_k", "d_v"):
        assert not before[name][~kept].any() and not after[name][~kept].any(), name


@pytest.mark.parametrize("block_size", [64, 192])
def test_non_finite_values_stay_in_their_document(block_size, target):
    bounds = [0, 90, 140, 400]
    q, k, v, d_out = target.inputs(bounds[-1], 2, 1, 64, seed=71)
    run = partial(moba, bounds=bounds, block_size=block_size, topk=2)
    poisoned = [x.detach().clone() for x in (q, k, v)]
    for x in poisoned:
        x[90:140] = float("nan")
    before, after = forward_backward(run, [q, k, v, d_out]), forward_backward(run, [*(x.requires_grad_() for x in poisoned), d_out])
    for name, value in before.items():
        assert after[name][90:140].isnan().all(), name
        assert torch.equal(after[name][:90], value[:90]) and torch.equal(after[name][140:], value[140:]), name


@pytest.mark.parametrize("num_blocks, value", [(9, float("inf")), (20, float("nan")), (20, float("inf")), (40, 1e-25)])
def test_whatever_the_scores_past_blocks_alone_are_chosen(num_blocks, value, target):
    """Also where columns of a tile of the gate lie past the end: a block id of another document would read and write anywhere."""
    bounds = [0, num_blocks * 64 + 10, num_blocks * 64 + 100]
    q, k, *_ = target.inputs(bounds[-1], 1, 1, 64, seed=85)
    q, k = q.detach().clone(), k.detach().clone()
    if value < 1:
        q, k = value * q, value * k
    else:
        q[::3, :, 5] = value
        k[128:256, :, 7] = k[300:310] = value
    chosen = kernel_choice(q, k, bounds=bounds, block_size=64, topk=9)
    own = torch.tensor([i // 64 for length in (bounds[1], 90) for i in range(length)], device=target.device)[:, None, None]
    taken = is_chosen(chosen, num_blocks + 2)
    assert (chosen < own).all() and torch.equal(taken.sum(-1), own[..., 0].clamp(max=8).expand(-1, 1))


@pytest.mark.parametrize("block_size", [64, 192])
def test_runs_repeat_to_the_bit(block_size, target):
    torch.use_deterministic_algorithms(False)  # as a user runs it
    inputs = target.inputs(300, 2, 1, 64, seed=72)
    run = partial(moba, bounds=[0, 50, 300], block_size=block_size, topk=2)
    assert_same_bits(*(forward_backward(run, inputs) for _ in range(2)))


@pytest.mark.parametrize("block_size", [64, 192])
def test_what_memory_held_before_changes_no_bit(block_size, target, monkeypatch):
    inputs = target.inputs(300, 2, 1, 64, seed=73)
    run = partial(moba, bounds=[0, 1, 50, 300], block_size=block_size, topk=2)
    assert torch.empty(1, device=target.device).isnan() and torch.empty(1, dtype=torch.int32).item() == torch.iinfo(torch.int32).max
    expected = forward_backward(run, inputs)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    assert_same_bits(forward_backward(run, inputs), expected)


@pytest.mark.parametrize("block_size", [64, 192])
def test_large_norms_do_not_overflow(block_size, target, monkeypatch):
    # Scores of 1e10 are the same in both passes, or their exponentials are not: as on a GPU, unlike a BLAS's.
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_by_row)
    q, k, v, d_out = target.inputs(300, 2, 1, 64, seed=74)
    norm = 100 if target.dtype == torch.float16 else 10000
    large = [(norm * x).detach().requires_grad_() for x in (q, k)]
    results = forward_backward(partial(moba, bounds=[0, 300], block_size=block_size, topk=2), [*large, v, d_out])
    for name, value in results.items():
        assert value.isfinite().all(), name
    # A mean of values is no larger than they are.
    assert results["out"].abs().max() <= v.abs().max() * (1 + torch.finfo(target.dtype).eps)


# T, Hq, Hkv, block_size, SPLIT; every list longer than SPLIT x past blocks x block_size is cut up
SINKS = {"one tile": (700, 2, 1, 64, 4), "several tiles": (620, 1, 1, 192, 1)}


@pytest.mark.parametrize("case", SINKS)
def test_block_that_all_choose_and_blocks_that_none_does(case, target, monkeypatch):
    num_tokens, num_heads, num_kv, block_size, split = SINKS[case]
    monkeypatch.setattr("model.ops.moba.triton.backward.SPLIT", split)
    monkeypatch.setattr("model.ops.moba.triton.backward._LEAST_SPLIT", 1)
    monkeypatch.setattr(plan, "_call_of", lru_cache(plan._call_of.__wrapped__))  # which has prepared nothing yet
    inputs = target.inputs(num_tokens, num_heads, num_kv, 64, seed=75)
    q, k, v, d_out = inputs
    with torch.no_grad():
        q[..., 0], k[..., 0] = 4, 0
        k[:block_size, :, 0] = 4  # the first block, which every query then takes for its one past block
    sizes = {"bounds": [0, num_tokens], "block_size": block_size, "topk": 2}
    chosen = kernel_choice(q, k, **sizes)
    assert not chosen[block_size:].any() and num_tokens - block_size > split * block_size
    assert_exact(inputs, **sizes)

    # The keys of a block that none chose have gradients from its own queries alone.
    never_chosen = slice(block_size, 2 * block_size)
    own = torch.zeros_like(d_out)
    own[never_chosen] = d_out[never_chosen]
    everything, own_alone = (forward_backward(partial(moba, **sizes), [q, k, v, x]) for x in (d_out, own))
    for name in ("d_k", "d_v"):
        assert own_alone[name][never_chosen].any()
        assert torch.equal(everything[name][never_chosen], own_alone[name][never_chosen]), name


# With 1024 tokens the second group's lists begin on no 16 bytes.
@pytest.mark.parametrize("num_tokens, block_size", [(300, 64), (300, 192), (1024, 64)])
def test_groups_of_heads_give_the_same_bits(num_tokens, block_size, target):
    inputs = target.inputs(num_tokens, 2, 2, 64, seed=76)
    run = partial(moba, bounds=[0, num_tokens], block_size=block_size, topk=2)
    expected = forward_backward(run, inputs)
    workspace = num_tokens * (64 * inputs[0].element_size() + 8 * 64 // schedule.SPLIT)  # what one of the two heads needs
    sizes = {"num_docs": 1, "block_size": block_size, "topk": 2, "workspace": workspace}
    cut = schedule.schedule((num_tokens, 2, 64), 2, inputs[0].element_size(), **sizes)
    assert (cut.num_groups, cut.num_ranges) == (2, 1)
    assert_same_bits(forward_backward(partial(run, workspace=workspace), inputs), expected)


@pytest.mark.parametrize("num_heads, num_kv", [(2, 1), (4, 2)])
def test_heads_listed_one_by_one_give_the_same_bits(num_heads, num_kv, target):
    inputs = target.inputs(300, num_heads, num_kv, 64, seed=86)
    run = partial(moba, bounds=[0, 40, 300], block_size=64, topk=3)
    workspace = 12_000
    sizes = {"num_docs": 2, "block_size": 64, "topk": 3, "workspace": workspace}
    cut = schedule.schedule((300, num_heads, 64), num_kv, inputs[0].element_size(), **sizes)
    assert (cut.heads, cut.listed, cut.num_ranges) == (2, 1, 1)
    assert_same_bits(forward_backward(partial(run, workspace=workspace), inputs), forward_backward(run, inputs))


@pytest.mark.parametrize("num_tokens, block_size, topk", [(700, 64, 9), (1000, 192, 5)])
def test_ranges_of_queries_in_a_workspace_too_small(num_tokens, block_size, topk, target, monkeypatch):
    """Less than one group of heads needs: as exact, and outputs the same to the bit. Gradients may be summed in another order."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_by_row)
    sizes = {"bounds": [0, num_tokens], "block_size": block_size, "topk": topk}
    inputs = target.inputs(num_tokens, 1, 1, 64, seed=77)
    shape = (tuple(inputs[0].shape), 1, inputs[0].element_size())
    assert schedule.schedule(*shape, num_docs=1, block_size=block_size, topk=topk, workspace=1).num_ranges >= 4
    assert_exact(inputs, **sizes, run=partial(moba, workspace=1))
    q, k, v = inputs[:3]
    assert torch.equal(moba(q, k, v, **sizes, workspace=1), moba(q, k, v, **sizes))


def test_views_of_more_than_32_bits(target):
    """2**31 elements of q: the first and the last document are as they are alone."""
    if target.device == "cpu":
        pytest.skip("hours in the interpreter")
    num_tokens, length = 1 << 20, 4096
    generator = torch.Generator(target.device).manual_seed(84)
    shapes = [(num_tokens, heads, 64) for heads in (32, 2, 2, 32)]
    inputs = [torch.randn(shape, generator=generator, device=target.device, dtype=target.dtype) for shape in shapes]
    q, k, v, d_out = inputs
    sizes = {"block_size": 1024, "topk": 2}
    bounds = [*range(0, num_tokens, length), num_tokens]
    packed = forward_backward(partial(moba, bounds=bounds, **sizes), [*(x.requires_grad_() for x in (q, k, v)), d_out])
    for part in (slice(0, length), slice(num_tokens - length, num_tokens)):
        leaves = [x[part].detach().requires_grad_() for x in (q, k, v)]
        alone = forward_backward(partial(moba, bounds=[0, length], **sizes), [*leaves, d_out[part]])
        assert_same_bits({name: value[part] for name, value in packed.items()}, alone)


def test_auto_takes_the_kernels_on_a_gpu_where_they_serve(target):
    run = partial(moba_attention, block_size=64, topk=2)
    inputs = target.inputs(200, 2, 1, 64, seed=83)
    expected = forward_backward(partial(run, backend="triton" if target.device == "cuda" else "torch"), inputs)
    assert_same_bits(forward_backward(run, inputs), expected)
    q, k, v, _ = target.inputs(200, 2, 1, 32, seed=83)  # a head dimension that they do not take
    torch.testing.assert_close(run(q, k, v), run(q, k, v, backend="torch"), rtol=0, atol=1e-3)


def test_recomputed_activations_give_the_same_bits(target):
    inputs = target.inputs(300, 2, 1, 64, seed=78)
    run = partial(moba, bounds=[0, 300], block_size=64, topk=2)
    again = partial(checkpoint, run, use_reentrant=False)
    assert_same_bits(forward_backward(again, inputs), forward_backward(run, inputs))


def test_kept_by_selective_checkpointing_the_kernels_run_once(target, monkeypatch):
    runs, plain = [], operator.moba_forward

    def moba_forward(*args):
        runs.append(args)
        return plain(*args)

    monkeypatch.setattr(operator, "moba_forward", moba_forward)
    inputs = target.inputs(300, 2, 1, 64, seed=78)
    run = partial(moba, bounds=[0, 300], block_size=64, topk=2)
    expected = forward_backward(run, inputs)
    assert_same_bits(forward_backward(partial(run_layer, run, "selective", HostMemory()), inputs), expected)
    assert len(runs) == 2
    assert_same_bits(forward_backward(partial(run_layer, run, "full", HostMemory()), inputs), expected)
    assert len(runs) == 4


def test_autocast_changes_nothing(target):
    inputs = target.inputs(200, 2, 1, 64, seed=79)
    run = partial(moba, bounds=[0, 200], block_size=64, topk=2)
    expected = forward_backward(run, inputs)
    with torch.autocast(target.device, dtype=torch.float16 if target.dtype == torch.bfloat16 else torch.bfloat16):
        assert_same_bits(forward_backward(run, inputs), expected)


def test_second_derivative_is_refused(target):
    q, k, v, d_out = target.inputs(200, 2, 1, 64, seed=80)
    out = moba(q, k, v, bounds=[0, 200], block_size=64, topk=2)
    (d_q,) = torch.autograd.grad(out, q, d_out, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moba::backward: .* no second derivative"):
        torch.autograd.grad(d_q.sum(), q)


def test_what_has_no_gradient_gets_none(target):
    assert_fills_nothing_for_no_gradient(partial(moba, bounds=[0, 100], block_size=64, topk=2), target.inputs(100, 1, 1, 64, seed=83))


def test_operators_keep_the_rules_of_torch(target):
    """Schema, fake kernels and autograd registration, as torch itself checks them."""
    q, k, v, _ = target.inputs(100, 1, 1, 64, seed=81)
    torch.library.opcheck(torch.ops.moba.forward, (q, k, v, cu_seqlens([0, 20, 100]), 64, 2, 0.125, WORKSPACE))


@pytest.mark.parametrize("bounds", [None, [0, 30, 200]])
def test_compiled_whole_it_gives_the_same_bits(bounds, target):
    cu = None if bounds is None else cu_seqlens(bounds)

    def run(q, k, v):
        return 2 * moba_attention(2 * q, k, v, cu_seqlens=cu, block_size=64, topk=2, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="inductor" if target.device == "cuda" else "aot_eager")
    inputs = target.inputs(200, 2, 1, 64, seed=82)
    assert_same_bits(forward_backward(compiled, inputs), forward_backward(run, inputs))


def losses(backend, *, num_steps, device, autocast):
    """Of a small decoder that learns one packed row, from the same start whatever the backend."""
    config = tiny_config(hidden_size=128, head_dim=64, num_heads=2, num_kv_heads=1, init_std=0.1)
    model = build(config, "last 1 full, rest moba(64, 2)", backend=backend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, positions, bounds = pack([200, 30, 1])
    tokens, positions = tokens.to(device), positions.to(device)
    found = []
    for _ in range(num_steps):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            logits = model(tokens, positions, bounds)
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_training_follows_the_torch_backend(target):
    if target.device == "cpu":
        ours, theirs = (losses(backend, num_steps=10, device="cpu", autocast=False) for backend in ("triton", "torch"))
        bound = 1e-4
    else:
        run = partial(losses, num_steps=50, device="cuda", autocast=True)
        ours, theirs, again = (run(backend) for backend in ("triton", "torch", "reference"))
        bound = 2 * (again - theirs).abs().max() + 1e-3  # bf16 noise: what two other right backends differ by
    assert theirs[-1] < theirs[0] - 0.1
    assert (ours - theirs).abs().max() <= bound
