"""What a run asks of kernels that do not take everything, checked before the model is built: of all stages, those to come too."""

import torch

from configs.layers import LayerAttention
from configs.schema import AttentionBackend, ConfigError, Precision, RunConfig, StageConfig
from model.ops import loss
from model.ops.moba.triton.limits import refused_kind, refused_sizes


def compute_dtype(precision: Precision) -> torch.dtype:
    """Of weights and activations in the forward pass."""
    return torch.bfloat16 if precision is Precision.BF16 else torch.float32


def triton_refusal(run: RunConfig, stage: StageConfig, kind: LayerAttention, device: torch.device, *, world_size: int) -> str | None:
    """Why the `triton` backend cannot serve a MoBA layer of a stage on the device, and what is accepted; None if it can."""
    model, rows = run.model, run.micro_batch_rows(stage, world_size)
    num_kv = model.num_kv_heads * model.kv_copies(run.parallel.sequence_parallel)
    return refused_kind(device, compute_dtype(run.parallel.precision)) or refused_sizes(
        num_tokens=rows * stage.seq_len,
        head_dim=model.head_dim,
        group=model.num_heads // num_kv,
        num_docs=rows,
        block_size=kind.block_size,
        topk=kind.topk,
    )


def check_attention(run: RunConfig, device: torch.device, *, world_size: int) -> None:
    """Raises ConfigError where the backend that some stage names does not take one of its layers on the device."""
    for index, stage in enumerate(run.stages):
        if stage.attention.backend is not AttentionBackend.TRITON:
            continue
        for kind in stage.attention.per_layer(run.model.num_layers):
            if kind.kind == "moba" and (refused := triton_refusal(run, stage, kind, device, world_size=world_size)):
                raise ConfigError(
                    f"stages.{index}.attention.backend=triton: does not take {kind} in {run.parallel.precision.value} on {device}: "
                    f"{refused}; auto takes what serves here"
                )


def check_loss(run: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where the chosen loss cannot be computed on the device."""
    if refused := loss.refusal(run.parallel.loss.value, device, compute_dtype(run.parallel.precision)):
        raise ConfigError(f"parallel.loss={run.parallel.loss.value}: {refused}; auto takes what serves here")
