"""The parts of a layer beside attention, and the loss, each in all ways there are: as it is, compiled, in tiles, and Liger's.

A way is a function of the part's tensors, of which those that require a gradient get one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from configs.schema import LayerBenchmarkConfig, LayerPart, RopeConfig
from model.ops import loss
from model.ops.swiglu import tiled_swiglu
from model.rope import rotary_table, rotate

Way = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Inputs, and by name what computes the same of them: the first is what the others are compared with."""

    inputs: tuple[Tensor, ...]
    ways: Mapping[str, Way]


def build(part: LayerPart, config: LayerBenchmarkConfig, num_tokens: int, device: torch.device) -> Part:
    """A part's inputs for `num_tokens`, bf16, the same each time, and its ways; Liger's only where it is installed and serves the device.

    Liger's backward passes write into what they were given, so that each way needs inputs of its own.
    """
    model = config.model
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device) * scale
        return made.to(torch.bfloat16).requires_grad_()

    liger = loss.refusal("liger", device, torch.bfloat16) is None
    hidden, ffn, vocabulary = model.hidden_size, model.ffn_size, model.vocab_size
    if part is LayerPart.NORM:
        return Part(inputs=(draw(num_tokens, hidden), draw(hidden)), ways=_ways(_norm, _liger_norm if liger else None))
    if part is LayerPart.ROPE:
        heads = (draw(num_tokens, model.num_heads, model.head_dim), draw(num_tokens, model.num_kv_heads, model.head_dim))
        table = rotary_table(torch.arange(num_tokens, device=device), model.head_dim, RopeConfig())
        return Part(inputs=(*heads, *table), ways=_ways(_rope, _liger_rope if liger else None))
    if part is LayerPart.SWIGLU:
        return Part(inputs=(draw(num_tokens, ffn), draw(num_tokens, ffn)), ways=_ways(_swiglu, _liger_swiglu if liger else None))
    if part is LayerPart.FFN:
        weights = (draw(ffn, hidden, scale=0.02), draw(ffn, hidden, scale=0.02), draw(hidden, ffn, scale=0.02))
        tiles = {f"tiles of {tile}": partial(_tiled_ffn, tile=tile) for tile in config.ffn_tiles if tile < num_tokens}
        return Part(inputs=(draw(num_tokens, hidden), *weights), ways={**_ways(_ffn, None), **tiles})
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator, device=device)
    backends = [name for name in loss.BACKENDS if name != "auto" and loss.refusal(name, device, torch.bfloat16) is None]
    if num_tokens > config.reference_up_to:
        backends.remove("reference")
    ways = {name: partial(_loss, backend=name) for name in backends}
    return Part(inputs=(draw(num_tokens, hidden), draw(vocabulary, hidden, scale=0.02), labels), ways=ways)


def _ways(eager: Way, liger: Way | None) -> dict[str, Way]:
    compiled = {"eager": eager, "compiled": torch.compile(eager, dynamic=False)}
    return {**compiled, "liger": liger} if liger else compiled


def _norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (functional.rms_norm(x, x.shape[-1:], weight, 1e-5),)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return rotate(q, (cos, sin)), rotate(k, (cos, sin))


def _swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (functional.silu(gate) * up,)


def _ffn(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, ...]:
    gate, up = functional.linear(x, gate_weight), functional.linear(x, up_weight)
    return (functional.linear(functional.silu(gate) * up, down_weight),)


def _tiled_ffn(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, *, tile: int) -> tuple[Tensor, ...]:
    return (tiled_swiglu(x, gate_weight, up_weight, down_weight, tile),)


def _loss(x: Tensor, weight: Tensor, labels: Tensor, *, backend: str) -> tuple[Tensor, ...]:
    return (loss.linear_cross_entropy(x, weight, labels, backend=backend).sum()[None],)


def _liger_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return (LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False),)


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rope import LigerRopeFunction

    table = (torch.cat((half, half), dim=-1).transpose(0, 1) for half in (cos, sin))
    turned = LigerRopeFunction.apply(*(x[None].transpose(1, 2) for x in (q, k)), *table)
    return tuple(x.transpose(1, 2)[0] for x in turned)


def _liger_swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return (LigerSiLUMulFunction.apply(gate, up),)
