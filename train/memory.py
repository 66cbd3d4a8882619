"""What the micro-batches of a stage hold: on a rank's device as reckoned from shapes, and in the memory of its machine."""

import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.layers import LayerAttention
from configs.schema import AttentionBackend, ConfigError, RunConfig, StageConfig
from model.accounting import parameter_counts
from model.memory import PassBytes, pass_bytes
from train.fragments import STATE_BYTES
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


def check_host_memory(run: RunConfig, machines: Sequence[tuple[str, int]], *, gpu: bool) -> None:
    """Raises ConfigError where a machine has not free what its ranks will keep there: what a stage offloads, those to come too, and the
    copy that checkpoints are written from. `machines` has what each rank says of its own, `this_machine`, before model and optimizer are
    made."""
    copied = STATE_BYTES * parameter_counts(run.model).total / len(machines) if run.checkpoint.copies else 0
    for index, stage in enumerate(run.stages):
        offloaded = stage_bytes(run, stage, world_size=len(machines), gpu=gpu).host
        for name in dict.fromkeys(name for name, _ in machines):
            free = [left for other, left in machines if other == name]
            if (offloaded + copied) * len(free) > min(free):
                raise ConfigError(_no_room(run, index, offloaded * len(free), copied * len(free), f"{len(free)} ranks", name, min(free)))


def _no_room(run: RunConfig, index: int, offloaded: float, copied: float, ranks: str, machine: str, free: int) -> str:
    """What takes more than `free` bytes of a machine's memory in a stage, and what would take less."""
    stage = run.stages[index]
    count = stage.activation.per_layer(run.model.num_layers).count("offload")
    kept, remedies = [], []
    if offloaded:
        kept.append(f"the inputs of {count} layers take {offloaded / 1e9:.4g} GB")
        remedies += [f"offload at most {max(0, int(count * (free - copied) // offloaded))} layers", "shorten the rows"]
    if copied:
        kept.append(f"the checkpoint's copy takes {copied / 1e9:.4g} GB")
        remedies.append("set checkpoint.background=false")
    key = f"stages.{index}.activation.rule={stage.activation.rule!r}" if offloaded else "checkpoint.background=true"
    told = f"{' and '.join(kept)} of host memory for {ranks}, {machine} has {free / 1e9:.4g} GB free"
    return f"{key}: {told}; {' or '.join(remedies)}"


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
