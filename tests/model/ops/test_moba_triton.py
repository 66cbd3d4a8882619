"""The Triton backend in Triton's interpreter, in fp32, against the specification in fp64."""

from functools import partial

import pytest
import torch

from model.ops.moba import moba_attention
from model.ops.moba.triton.limits import refusal
from tests.model.ops.helpers import assert_error_within_twice, cu_seqlens, forward_backward, make_inputs, with_dtype

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter was not chosen")

triton = partial(moba_attention, backend="triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the operator asks when it is called what Triton asked when it was imported


@pytest.mark.parametrize(
    "bounds, heads, head_dim, block_size, topk",
    [
        ([0, 300], (2, 1), 64, 64, 3),
        ([0, 1, 64, 65, 400], (2, 2), 64, 64, 2),
        ([0, 5, 400], (4, 1), 128, 64, 1),
        ([0, 130, 600], (2, 2), 64, 128, 3),
        ([0, 900], (1, 1), 64, 192, 3),
    ],
)
def test_equals_the_specification(bounds, heads, head_dim, block_size, topk):
    exact = make_inputs(bounds[-1], *heads, head_dim, seed=61)
    sizes = {"block_size": block_size, "topk": topk, "cu_seqlens": cu_seqlens(bounds)}
    reference = partial(moba_attention, backend="reference", **sizes)
    single = with_dtype(exact, torch.float32)
    found, plain = (forward_backward(attention, single) for attention in (partial(triton, **sizes), reference))
    assert_error_within_twice(found, plain, forward_backward(reference, exact))


@pytest.mark.parametrize("workspace", [1, 100_000])
def test_a_small_workspace_changes_no_output(workspace):
    inputs = make_inputs(400, 2, 1, 64, seed=62, dtype=torch.float32)
    sizes = {"block_size": 64, "topk": 3, "cu_seqlens": cu_seqlens([0, 70, 400])}
    whole, parts = (forward_backward(partial(triton, **sizes, workspace=w), inputs) for w in (1 << 30, workspace))
    assert torch.equal(whole["out"], parts["out"])
    for name in ("d_q", "d_k", "d_v"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-5)


def test_ties_go_to_the_lower_block():
    inputs = make_inputs(400, 1, 1, 64, seed=63, dtype=torch.float32)
    q, k, v, _ = (x.detach() for x in inputs)
    k[:384] = k[:64].repeat(6, 1, 1)  # blocks of equal means: all scores of a query are equal
    k[256:320] += q[384:].mean(0)  # but one, which the last queries may like better
    sizes = {"block_size": 64, "topk": 3}
    expected = moba_attention(q, k, v, **sizes, backend="reference")
    torch.testing.assert_close(triton(q, k, v, **sizes), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("documents", [None, [0, 5, 300]])
def test_compiles_without_a_break(documents):
    inputs = make_inputs(300, 2, 1, 64, seed=64, dtype=torch.float32)
    sizes = {"block_size": 64, "topk": 2, "cu_seqlens": None if documents is None else cu_seqlens(documents)}
    plain = partial(triton, **sizes)
    compiled = torch.compile(lambda q, k, v: plain(q, k, v), fullgraph=True, backend="aot_eager")
    eager, traced = (forward_backward(attention, inputs) for attention in (plain, compiled))
    for name, value in eager.items():
        assert torch.equal(traced[name], value), name


@pytest.mark.parametrize(
    "shape, dtype, block_size, topk, message",
    [
        ((9, 2, 64), torch.float64, 64, 2, "q has dtype torch.float64; accepted: torch.bfloat16, torch.float16"),
        ((9, 2, 96), torch.float16, 64, 2, "q has head dimension 96; accepted: 64, 128"),
        ((9, 2, 64), torch.float16, 96, 2, "block_size=96; accepted: multiples of 64 up to 32768"),
        ((9, 2, 64), torch.float16, 32832, 2, "block_size=32832; accepted: multiples of 64 up to 32768"),
        ((9, 2, 64), torch.float16, 64, 65, "topk=65; accepted: 1 to 64"),
    ],
)
def test_what_it_does_not_take_is_said(shape, dtype, block_size, topk, message):
    q = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=f"^backend='triton': {message}; backend='torch' takes others$"):
        triton(q, q[:, :1], q[:, :1], block_size=block_size, topk=topk)


def test_without_interpreter_and_gpu_it_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    q = torch.zeros(9, 2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="q is on cpu; accepted: a CUDA device"):
        triton(q, q, q, block_size=64, topk=2)
    assert refusal(torch.empty(1 << 20, 64, 64, device="meta"), q[:, :1], block_size=64, topk=64)
