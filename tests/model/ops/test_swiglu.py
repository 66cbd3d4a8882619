"""The feed-forward in tiles against the one at once: output, every gradient, and a compiled block."""

import pytest
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.layers import FeedForward
from tests.model.ops.helpers import assert_all_close, assert_error_within_twice

NUM_TOKENS, TILES = 37, [1, 5, 36]
CONFIG = ModelConfig(hidden_size=16, ffn_size=24)


def results(tile: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Output and all gradients of a feed-forward with set weights."""
    generator = torch.Generator().manual_seed(0)
    x, d_y = (torch.randn(NUM_TOKENS, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    ffn = FeedForward(CONFIG, tile)
    for parameter in ffn.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ffn, x, d_y = ffn.to(device, dtype), x.to(device, dtype).requires_grad_(), d_y.to(device, dtype)
    y = ffn(x)
    y.backward(d_y)
    gradients = {name: parameter.grad for name, parameter in ffn.named_parameters()}
    assert all(gradient.dtype == dtype for gradient in gradients.values())
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("tile", TILES)
def test_output_and_every_gradient(tile):
    assert_all_close(results(tile, torch.float64), results(0, torch.float64), atol=1e-11)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_as_exact_as_at_once(tile, device, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    tiled, plain, exact = results(tile, torch.bfloat16, device), results(0, torch.bfloat16, device), results(0, torch.float64, device)
    assert_error_within_twice(tiled, plain, exact)


@pytest.mark.parametrize("tile", [NUM_TOKENS, NUM_TOKENS + 1])
def test_a_tile_of_all_tokens_changes_nothing(tile):
    assert_all_close(results(tile, torch.float64), results(0, torch.float64), atol=0)


def test_it_is_one_node_of_a_compiled_graph():
    ffn, x = FeedForward(CONFIG, 5), torch.randn(NUM_TOKENS, 16, requires_grad=True)
    graphs = []

    def look(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(ffn, backend=look, fullgraph=True)
    torch.testing.assert_close(compiled(x), ffn(x))
    assert [len(graph) for graph in graphs] == [1]
