"""What the micro-batches of a stage hold: on a rank's device as reckoned from shapes, and in the memory of its machine."""

import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.layers import LayerAttention
from configs.schema import AttentionBackend, ConfigError, RunConfig, StageConfig
from model.memory import PassBytes, pass_bytes
from train.kernels import compute_dtype, triton_refusal

# Of a container, by version of cgroups: its limit, what counts against it, and where its statistics say what of that can be had back.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def stage_bytes(run: RunConfig, stage: StageConfig, *, world_size: int, gpu: bool) -> PassBytes:
    """What one micro-batch of a stage holds on one rank."""
    layers = run.model.num_layers
    return layers_bytes(run, stage, stage.attention.per_layer(layers), stage.activation.per_layer(layers), world_size=world_size, gpu=gpu)


def layers_bytes(
    run: RunConfig, stage: StageConfig, attention: Sequence[LayerAttention], activation: Sequence[str], *, world_size: int, gpu: bool
) -> PassBytes:
    """The same in a model whose layers have `attention` and keep `activation`."""
    rows = run.micro_batch_rows(stage, world_size)
    triton = gpu and _triton_serves(run, stage, attention, world_size=world_size)
    return pass_bytes(
        run.model,
        attention,
        activation,
        rows=rows,
        seq_len=stage.seq_len,
        itemsize=compute_dtype(run.parallel.precision).itemsize,
        gpu=gpu,
        triton_workspace=stage.attention.workspace if triton else 0,
        sequence_parallel=run.parallel.sequence_parallel,
        loss=run.parallel.loss,
        ffn_tile=run.parallel.ffn_tile,
    )


def _triton_serves(run: RunConfig, stage: StageConfig, attention: Sequence[LayerAttention], *, world_size: int) -> bool:
    """Whether `backend` comes to Triton on a GPU for all MoBA layers: what its limits refuse, `auto` gives to torch."""
    chosen = stage.attention.backend in (AttentionBackend.AUTO, AttentionBackend.TRITON)
    gpu = torch.device("cuda")
    return chosen and not any(triton_refusal(run, stage, kind, gpu, world_size=world_size) for kind in attention if kind.kind == "moba")


def check_host_memory(run: RunConfig, stages: Sequence[StageConfig], machines: Sequence[tuple[str, int]], *, gpu: bool) -> None:
    """Raises ConfigError where what one of `stages` offloads, on all ranks of a machine, is more than it has free; `machines` has what
    each rank says of its own, `this_machine`."""
    for stage in stages:
        host = stage_bytes(run, stage, world_size=len(machines), gpu=gpu).host
        for name in dict.fromkeys(name for name, _ in machines):
            free = [left for other, left in machines if other == name]
            if (needed := host * len(free)) > min(free):
                count = stage.activation.per_layer(run.model.num_layers).count("offload")
                raise ConfigError(
                    f"stages.{run.stages.index(stage)}.activation.rule={stage.activation.rule!r}: the inputs of {count} layers take "
                    f"{needed / 1e9:.4g} GB of host memory for {len(free)} ranks, {name} has {min(free) / 1e9:.4g} GB free; offload at "
                    f"most {count * min(free) // needed} layers, or shorten the rows"
                )


def this_machine() -> tuple[str, int]:
    """Its name, and the bytes it has free."""
    return socket.gethostname(), free_host_memory()


def free_host_memory() -> int:
    """Bytes that this machine, or the container we run in, can still give."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for *names, of_files in _CGROUPS:
        limit, used, statistics = (Path("/sys/fs/cgroup", name) for name in names)
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            again = dict(line.split() for line in statistics.read_text().splitlines())[of_files]
            free = min(free, int(most) - int(used.read_text()) + int(again))
    return max(0, free)
