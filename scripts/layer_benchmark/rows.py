"""Time, memory and difference of each way to compute a part, forward and backward."""

import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from configs.schema import LayerBenchmarkConfig, LayerPart
from scripts.data_benchmark.report import Measured
from scripts.layer_benchmark.ways import Way, build

_WARM_UP = 3  # calls before the first timed one: compilation, then caches


def measure(config: LayerBenchmarkConfig, device: torch.device) -> Iterator[Measured]:
    """The median ms of each way, with its peak (on a GPU) and its largest difference from the first way in the note."""
    for part in config.parts:
        for num_tokens in config.lengths:
            first: list[Tensor] = []
            for name in build(part, config, num_tokens, device).ways:
                figure, found = _measure(part, name, config, num_tokens, device, first)
                first = first or found
                yield figure


def _measure(
    part: LayerPart, name: str, config: LayerBenchmarkConfig, num_tokens: int, device: torch.device, first: list[Tensor]
) -> tuple[Measured, list[Tensor]]:
    made = build(part, config, num_tokens, device)
    way, inputs = made.ways[name], made.inputs
    found = [tensor.detach().cpu() for tensor in _call(way, inputs)]  # before anything has written into the inputs again
    for _ in range(_WARM_UP):
        _call(way, inputs)
    peak = ""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _call(way, inputs)
        peak = f"peak {(torch.cuda.max_memory_allocated(device) - before) / 2**20:,.0f} MiB"
    seconds = [_time(way, inputs, device) for _ in range(config.repeats)]
    note = ", ".join(filter(None, [peak, f"differs by {_difference(found, first):.1e}" if first else ""]))
    what = f"{part.value}, {num_tokens:,} tokens: {name}"
    return Measured(name=what, value=1000 * statistics.median(seconds), unit="ms", note=note), found


def _call(way: Way, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs and the gradients of their sum."""
    outputs = way(*inputs)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])]


def _time(way: Way, inputs: tuple[Tensor, ...], device: torch.device) -> float:
    started = time.perf_counter()
    _call(way, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _difference(found: list[Tensor], first: list[Tensor]) -> float:
    """Of output or gradient, the largest relative one in root-mean-square."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, first, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
