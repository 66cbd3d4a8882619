"""torch.compile of what surrounds attention in a layer: the projections with their norms and RoPE, and all that follows attention.

Attention stays outside. It reads document boundaries, by which it chooses kernels, and which no two batches share: inside a graph they
would be guarded, or be unknown. What is left depends on the number of tokens alone, so a graph serves all layers and all batches of a
stage: three in all, since layers without positions have projections of their own (with key convolutions two graphs for each).
"""

import torch

from model.transformer import Block, Transformer

# Graphs of one function before Dynamo gives up, which is then an error: those of a few dozen stages, with and without gradients.
_MOST = 128


def compile_layers(model: Transformer, backend: str = "inductor") -> None:
    """Compiles the layers of `model` in place, each part when it first runs; `backend` is torch.compile's."""
    torch._dynamo.config.recompile_limit = _MOST
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # Dynamo's own choice is to go on without the compiler, in silence
    if model.config.key_conv:  # it reads the boundaries, so a graph before and one after it, which know that their number changes
        model.register_forward_pre_hook(lambda _, inputs: torch._dynamo.mark_dynamic(inputs[2], 0))
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention = layer.attention
        if attention.key_conv is not None:
            attention.key_conv.forward = torch.compiler.disable(attention.key_conv.forward)  # type: ignore[method-assign]
        attention.project = torch.compile(attention.project, dynamic=False, backend=backend)  # type: ignore[method-assign]
        layer.finish = torch.compile(layer.finish, dynamic=False, backend=backend)  # type: ignore[method-assign]


def graphs_compiled() -> int:
    """Graphs that this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
