"""CUDA graphs of attention: replayed with other values, after every cache has let go of what they read."""

import gc
import weakref
from functools import partial

import pytest
import torch

from model.ops import graphs
from model.ops.full import flash, full_attention
from model.ops.moba import moba_attention
from model.ops.moba.triton import plan
from tests.model.ops.helpers import cu_seqlens, make_inputs

BOUNDS = [0, 100, 1000, 1600]
CACHES = (plan._call_of, plan.block_table, flash._on_device)


def clear_caches():
    for cache in CACHES:
        cache.cache_clear()
    gc.collect()


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    monkeypatch.setattr(graphs, "_read_by_graphs", set())
    clear_caches()
    yield
    clear_caches()


@pytest.mark.parametrize("captures", [False, True])
def test_what_a_graph_reads_outlives_the_caches(captures, monkeypatch):
    monkeypatch.setattr(graphs, "_is_capturing", lambda device: captures)
    q, k = (torch.zeros(1600, heads, 64) for heads in (2, 1))
    call = plan.call_of(q, k, tuple(BOUNDS), block_size=64, topk=2, softmax_scale=1.0, workspace=1 << 30)
    bounds, _ = flash._bounds(q, cu_seqlens(BOUNDS))
    read = [weakref.ref(x) for x in (call.blocks.start, call.blocks.length, call.blocks.doc_first, bounds)]
    del call, bounds
    clear_caches()
    assert [x() is not None for x in read] == [captures] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [partial(moba_attention, block_size=64, topk=3, backend="triton"),
                                       partial(moba_attention, block_size=256, topk=2, backend="triton"),
                                       partial(full_attention, backend="flash")])  # fmt: skip
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_a_graph_replayed_with_other_values_gives_what_they_give(attention, bounds):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cu = None if bounds is None else cu_seqlens(bounds)
    inputs, others = (
        [x.detach().cuda() for x in make_inputs(BOUNDS[-1], 4, 2, 64, seed=seed, dtype=torch.bfloat16)] for seed in (110, 111)
    )
    q, k, v, d_out = (x.clone().requires_grad_(index < 3) for index, x in enumerate(inputs))

    def both():
        out = attention(q, k, v, cu_seqlens=cu)
        return [out, *torch.autograd.grad(out, (q, k, v), d_out)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            both()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        captured = both()

    clear_caches()
    filled = [torch.full((size,), 1 << 30, dtype=torch.int32, device="cuda") for size in (4, 30, 128, 1000) for _ in range(64)]
    for values in (others, inputs):
        with torch.no_grad():
            for x, value in zip((q, k, v, d_out), values):
                x.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(captured, both(), strict=True):
            assert torch.equal(found, expected)
    assert all((x == 1 << 30).all() for x in filled)
