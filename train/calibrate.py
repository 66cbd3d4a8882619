"""Forward and backward of a plan's shapes, really run on this machine's device, beside what was reckoned.

Models of one and of two layers of each kind of attention are timed: their difference is a layer, what is left embedding, head and
loss. So a model fits whose layers do not all fit. The optimizer and other ranks are not in it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from configs.layers import LayerAttention
from configs.schema import ConfigError, PlanConfig, Precision, StageConfig
from model.memory import effective
from model.transformer import Transformer
from train.distributed import choose_device
from train.plan import Plan, StagePlan, micro_batch_bytes
from train.trainer import check_loss

REPEATS = 3  # after one call to warm up; the fastest counts


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """Forward and backward of one micro-batch: seconds, and bytes saved between the two."""

    seconds: float
    activations: int


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """A stage on this device; whole-model figures are sums over its layers."""

    layers: dict[LayerAttention, LayerFigures]
    ends: LayerFigures
    """Embedding, final norm, head and loss."""
    step_seconds: float
    """Of one optimizer step of a rank, the optimizer left out."""
    activations: int
    """Bytes that a micro-batch of the whole model saves."""
    reckoned: int
    """The same as the plan reckons it for this device."""


def calibrate(plan: Plan) -> tuple[str, tuple[StageFigures, ...]]:
    """The device's name and the figures of each stage. Raises ConfigError where the device cannot hold two layers, or not take the
    loss that the plan asks for."""
    device = choose_device(plan.config.device)
    check_loss(plan.config, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return name, tuple(_measure_stage(plan.config, stage, index, device) for index, stage in enumerate(plan.stages))


def _measure_stage(config: PlanConfig, plan: StagePlan, index: int, device: torch.device) -> StageFigures:
    kinds = [effective(kind, plan.stage.seq_len) for kind in plan.attention]
    layers: dict[LayerAttention, LayerFigures] = {}
    ends: list[LayerFigures] = []
    for kind in dict.fromkeys(kinds):
        _check_room(config, plan.stage, kind, index, device)
        try:
            one, two = (_measure(config, plan.stage, (kind,) * count, device) for count in (1, 2))
        except torch.cuda.OutOfMemoryError:
            raise ConfigError(f"measure=true: two layers of {kind} at stages.{index}.seq_len={plan.stage.seq_len} do not fit") from None
        layers[kind] = LayerFigures(seconds=max(0.0, two.seconds - one.seconds), activations=two.activations - one.activations)
        ends.append(LayerFigures(seconds=max(0.0, 2 * one.seconds - two.seconds), activations=one.activations - layers[kind].activations))
    rest = min(ends, key=lambda figures: figures.seconds)
    return StageFigures(
        layers=layers,
        ends=rest,
        step_seconds=plan.micro_batches * (rest.seconds + sum(layers[kind].seconds for kind in kinds)),
        activations=rest.activations + sum(layers[kind].activations for kind in kinds),
        reckoned=micro_batch_bytes(config, plan.stage, plan.attention, gpu=device.type == "cuda").activations,
    )


def _check_room(config: PlanConfig, stage: StageConfig, kind: LayerAttention, index: int, device: torch.device) -> None:
    gpu = device.type == "cuda"
    held = micro_batch_bytes(config, stage, (kind, kind), gpu=gpu)
    free = torch.cuda.mem_get_info(device)[0] if gpu else _available_memory()
    if held.peak > free:
        raise ConfigError(
            f"measure=true: two layers of {kind} at stages.{index}.seq_len={stage.seq_len} hold about {held.peak / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free here; shorten the rows or measure on a larger device"
        )


def _available_memory() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def _measure(config: PlanConfig, stage: StageConfig, attention: tuple[LayerAttention, ...], device: torch.device) -> LayerFigures:
    shape = replace(config.model, num_layers=len(attention))
    rope = replace(stage.rope, nope="")  # it names layers of the whole model; without positions a layer does and keeps almost the same
    backend, workspace = stage.attention.backend.value, stage.attention.workspace
    loss, tile = config.parallel.loss.value, config.parallel.ffn_tile
    with device:
        model = Transformer(shape, attention, rope, backend, workspace, loss=loss, ffn_tile=tile)
    model.to(torch.bfloat16 if config.parallel.precision is Precision.BF16 else torch.float32)
    rows = config.micro_batch_rows(stage, config.num_gpus)
    num_tokens = rows * stage.seq_len
    tokens = torch.randint(shape.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(stage.seq_len, device=device).repeat(rows)
    cu_seqlens = torch.arange(0, num_tokens + 1, stage.seq_len, dtype=torch.int32)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, positions, cu_seqlens, tokens).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    saved = saved_bytes(model, lambda: model.hidden(tokens, positions, cu_seqlens))
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return LayerFigures(seconds=min(seconds[1:]), activations=saved)


def saved_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, its result included, each storage once, without the model's parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)  # held, so that no other tensor takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(forward())
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)
