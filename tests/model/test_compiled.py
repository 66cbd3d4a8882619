"""torch.compile of the parts of layers: how many graphs there are, that packing adds none, and that results stay."""

import pytest
import torch

from configs.schema import ActivationConfig
from model import compiled
from model.compiled import compile_layers, graphs_compiled
from model.transformer import Transformer
from tests.model.helpers import build, pack, tiny_config

RULE = "every 2 moba(8, 2), rest sliding(16)"
LAYERS = 9  # more than Dynamo allows graphs of a function
PACKINGS = ([48], [20, 28], [1, 2, 45], [10, 10, 10, 18])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def _model(**changes: object) -> Transformer:
    return build(tiny_config(num_layers=LAYERS, **changes), RULE, nope="every 3")


def _new_graphs(model: Transformer, lengths: list[int]) -> int:
    """Compiled for a step on a row of documents of `lengths`."""
    before = graphs_compiled()
    tokens, *rest = pack(lengths)
    model(tokens, *rest, tokens.roll(-1)).sum().backward()
    return graphs_compiled() - before


@pytest.mark.parametrize(("changes", "graphs"), [({}, 3), ({"key_conv": 3, "qk_norm": True}, 4)], ids=["plain", "convolved"])
def test_graphs_are_those_of_one_layer_and_packing_adds_none(changes, graphs):
    model, plain = _model(**changes), _model(**changes)
    compile_layers(model, backend="aot_eager")
    assert (_new_graphs(model, PACKINGS[0]), _new_graphs(plain, PACKINGS[0])) == (graphs, 0)
    for kept in ("none", "selective", "full", "offload"):
        model.set_activation(ActivationConfig(rule=kept).per_layer(LAYERS))
        for lengths in PACKINGS:
            assert (_new_graphs(model, lengths), _new_graphs(plain, lengths)) == (0, 0)
    for (name, found), expected in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(found.grad, expected.grad), name


def test_a_switch_counts_and_what_comes_back_does_not():
    model = _model()
    compile_layers(model, backend="aot_eager")
    assert _new_graphs(model, [48]) == 3
    assert _new_graphs(model, [96]) == 3  # longer rows
    model.set_attention(build(model.config, "full").attention)  # another attention has the same surroundings
    assert [_new_graphs(model, lengths) for lengths in ([96], [48], [50, 46])] == [0, 0, 0]


def test_too_many_graphs_are_an_error(monkeypatch):
    """Where Dynamo would go on without the compiler, and say so once in a log."""
    monkeypatch.setattr(compiled, "_MOST", 2)
    model = _model()
    compile_layers(model, backend="aot_eager")
    with pytest.raises(Exception, match="recompile_limit"):
        for length in (40, 41, 42, 43):
            _new_graphs(model, [length])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kept", ["none", "selective", "full", "offload"])
def test_on_a_gpu_with_its_own_kernels(kept):
    """bf16, MoBA and full layers: as without the compiler within what bf16 loses, and no graph more for other packings."""
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 512, "max_seq_len": 8192, "init_std": 0.05}
    model, plain = (build(tiny_config(num_layers=4, **sizes), "last 1 full, rest moba(64, 3)").to("cuda", torch.bfloat16) for _ in range(2))
    model.set_activation(ActivationConfig(rule=kept).per_layer(4))
    compile_layers(model)
    found = []
    for lengths in ([2048], [300, 1748], [1, 47, 2000]):
        tokens, positions, bounds = pack(lengths)
        tokens, positions = tokens.cuda(), positions.cuda()
        before = graphs_compiled()
        losses = [each(tokens, positions, bounds, tokens.roll(-1)) for each in (model, plain)]
        for loss in losses:
            loss.sum().backward()
        found.append(graphs_compiled() - before)
        torch.testing.assert_close(losses[0].mean(), losses[1].mean(), rtol=1e-2, atol=0)
    assert found[1:] == [0, 0] and found[0] == 2
    for (name, one), other in zip(model.named_parameters(), plain.parameters()):
        assert torch.nn.functional.cosine_similarity(one.grad.float().flatten(), other.grad.float().flatten(), dim=0) > 0.99, name
