"""What a user would take otherwise: Hugging Face's class, Liger's kernels, SDPA, torch's fused AdamW; weights and moments in one dtype."""

import contextlib
import importlib.metadata
import importlib.util
import time
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.model_file import ModelFile
from configs.schema import ConfigError, Precision, TrainBenchmarkConfig
from data.loader import build_loader
from model.accounting import FULL, parameter_counts, training_flops
from model.hf import to_config
from train.distributed import choose_device
from train.gpus import peak_flops
from train.metrics import Metrics, memory_gib

# cuDNN's is the fastest where it runs; the last needs memory in proportion to the length's square.
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def is_installed() -> bool:
    """Whether transformers can be found; Liger's kernels are used where they are."""
    return importlib.util.find_spec("transformers") is not None


def transformers_steps(run: TrainBenchmarkConfig, metrics: Metrics) -> tuple[str, torch.device]:
    """The run's steps on its rows, a line of metrics for each; returns the program's name with its versions, and the device.

    Attention is over whole rows: the class does not know of documents in them. Raises ConfigError as `class_config` does.
    """
    device, stage = choose_device(run.device), run.stages[0]
    uses_liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    model = _build(run, device, uses_liger=uses_liger)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optim.lr, betas=(run.optim.beta1, run.optim.beta2), fused=True)
    loader = build_loader(
        run.data.prepared_dir,
        seq_len=stage.seq_len,
        rows_per_step=stage.rows,
        micro_batch_rows=run.micro_batch_rows(stage, 1),
        seed=run.seed,
        mix=stage.mix,
    )
    flops = training_flops(run.model, [FULL] * run.model.num_layers, [stage.seq_len] * stage.rows).executed
    peak = peak_flops(device)
    for step in range(1, run.total_steps + 1):
        started = time.perf_counter()
        batches = loader.next_step()
        data_wait = time.perf_counter() - started
        losses = []
        for batch in batches:
            tokens = batch.tokens.to(device)
            with sdpa_kernel(_BACKENDS, set_priority=True) if device.type == "cuda" else contextlib.nullcontext():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(batches)
                loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        values = {"loss": float(sum(losses)), "grad_norm": float(norm)}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        mfu = flops / (peak * seconds) if peak else None
        metrics.step(
            {
                "step": step,
                **values,
                "tokens": step * stage.batch_tokens,
                "tokens_per_second": stage.batch_tokens / seconds,
                "mfu_dense_equivalent": mfu,
                "mfu_executed": mfu,
                "memory_gib": memory_gib(device),
                "data_wait": data_wait / seconds,
                "step_seconds": seconds,
            }
        )
    packages = ["transformers", *(["liger-kernel"] if uses_liger else [])]
    return " + ".join(f"{package} {importlib.metadata.version(package)}" for package in packages), device


def class_config(run: TrainBenchmarkConfig) -> dict[str, Any]:
    """The config of transformers' own class that computes the run's model. Raises ConfigError where it has none."""
    described = ModelFile(model=run.model, rope=run.stages[0].rope, attention=run.stages[0].attention)
    precision = "bfloat16" if run.parallel.precision is Precision.BF16 else "float32"
    values = to_config(described, dtype=precision, token_ids={})
    if "auto_map" in values:
        raise ConfigError("stages.0.rope: no class of transformers has layers without positions, or these positions")
    return values


def _build(run: TrainBenchmarkConfig, device: torch.device, *, uses_liger: bool) -> nn.Module:
    """The class of transformers that computes our model, with random weights made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = class_config(run)
    if uses_liger:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        MODEL_TYPE_TO_APPLY_LIGER_FN[values["model_type"]]()
    with torch.device(device):
        config = AutoConfig.for_model(**values)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, values["dtype"]), attn_implementation="sdpa")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_counts(run.model).total
    model.train()
    if run.checkpointing:
        model.gradient_checkpointing_enable()
    return model
