"""Forward and backward of a plan's shapes, really run on this machine's device, beside what was reckoned.

Models of one and of two layers of each kind of attention, and of what is kept of it, are timed: their difference is a layer, what is
left embedding, head and loss. So a model fits whose layers do not all fit. The optimizer and other ranks are not in it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.layers import LayerAttention
from configs.schema import ConfigError, PlanConfig, StageConfig
from model.memory import effective
from model.transformer import Transformer
from train.distributed import choose_device
from train.kernels import check_attention, check_loss, compute_dtype
from train.memory import free_host_memory, layers_bytes, stage_bytes
from train.plan import Plan, StagePlan

REPEATS = 3  # after one call to warm up; the fastest counts


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """Forward and backward of one micro-batch: seconds, and bytes kept on the device between the two."""

    seconds: float
    activations: int


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """A stage on this device; whole-model figures are sums over its layers."""

    layers: dict[tuple[LayerAttention, str], LayerFigures]
    """By attention and what is kept (`configs.layers.ACTIVATIONS`)."""
    ends: LayerFigures
    """Embedding, final norm, head and loss."""
    step_seconds: float
    """Of one optimizer step of a rank, the optimizer left out."""
    activations: int
    """Bytes that a micro-batch of the whole model keeps on the device."""
    reckoned: int
    """The same as the plan reckons it for this device."""


def calibrate(plan: Plan) -> tuple[str, tuple[StageFigures, ...]]:
    """The device's name and the figures of each stage. Raises ConfigError where the device cannot hold two layers, or not take the
    attention or the loss that the plan asks for."""
    device = choose_device(plan.config.device)
    check_attention(plan.config, device, world_size=plan.config.num_gpus)
    check_loss(plan.config, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return name, tuple(_measure_stage(plan.config, stage, index, device) for index, stage in enumerate(plan.stages))


def _measure_stage(config: PlanConfig, plan: StagePlan, index: int, device: torch.device) -> StageFigures:
    attention = [effective(kind, plan.stage.seq_len) for kind in plan.attention]
    kinds = list(zip(attention, plan.stage.activation.per_layer(config.model.num_layers), strict=True))
    layers: dict[tuple[LayerAttention, str], LayerFigures] = {}
    ends: list[LayerFigures] = []
    for kind in dict.fromkeys(kinds):
        _check_room(config, plan.stage, kind, index, device)
        try:
            one, two = (_measure(config, plan.stage, [kind] * count, device) for count in (1, 2))
        except torch.cuda.OutOfMemoryError:
            raise ConfigError(f"measure=true: two layers of {kind[0]} at stages.{index}.seq_len={plan.stage.seq_len} do not fit") from None
        layers[kind] = LayerFigures(seconds=max(0.0, two.seconds - one.seconds), activations=two.activations - one.activations)
        ends.append(LayerFigures(seconds=max(0.0, 2 * one.seconds - two.seconds), activations=one.activations - layers[kind].activations))
    rest = min(ends, key=lambda figures: figures.seconds)
    return StageFigures(
        layers=layers,
        ends=rest,
        step_seconds=plan.micro_batches * (rest.seconds + sum(layers[kind].seconds for kind in kinds)),
        activations=rest.activations + sum(layers[kind].activations for kind in kinds),
        reckoned=stage_bytes(config, plan.stage, world_size=config.num_gpus, gpu=device.type == "cuda").activations,
    )


def _check_room(config: PlanConfig, stage: StageConfig, kind: tuple[LayerAttention, str], index: int, device: torch.device) -> None:
    gpu = device.type == "cuda"
    attention, kept = kind
    held = layers_bytes(config, stage, [attention] * 2, [kept] * 2, world_size=config.num_gpus, gpu=gpu)
    free = torch.cuda.mem_get_info(device)[0] if gpu else free_host_memory()
    if held.peak > free:
        raise ConfigError(
            f"measure=true: two layers of {attention} at stages.{index}.seq_len={stage.seq_len} hold about {held.peak / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free here; shorten the rows or measure on a larger device"
        )


def _measure(config: PlanConfig, stage: StageConfig, layers: list[tuple[LayerAttention, str]], device: torch.device) -> LayerFigures:
    shape = replace(config.model, num_layers=len(layers))
    attention, activation = zip(*layers)
    rope = replace(stage.rope, nope="")  # it names layers of the whole model; without positions a layer does and keeps almost the same
    backend, workspace = stage.attention.backend.value, stage.attention.workspace
    loss, tile = config.parallel.loss.value, config.parallel.ffn_tile
    with device:
        model = Transformer(shape, attention, rope, backend, workspace, loss=loss, ffn_tile=tile)
    model.set_activation(activation)
    model.to(compute_dtype(config.parallel.precision))
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

    saved = kept_bytes(model, lambda: model.hidden(tokens.clone(), positions, cu_seqlens))
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return LayerFigures(seconds=min(seconds[1:]), activations=saved)


def kept_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of all that a forward pass makes on the model's device and that is still there when it is over, its result included."""
    parameters = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    with _Made() as made:
        result = forward()
    device = result.device
    return sum(
        size for (storage, where), size in made.sizes.items() if where == device and not storage.expired() and storage not in parameters
    )


class _Made(TorchDispatchMode):
    """The storages that operators give, and their sizes in bytes, by themselves and their device."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[tuple[StorageWeakRef, torch.device], int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage), tensor.device] = storage.nbytes()
        return given
