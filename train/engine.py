"""DeepSpeed, and nothing but DeepSpeed: the only file that imports it, and the one place its config dict is derived.

What DeepSpeed leaves silent is made loud here: a skipped step is returned as such at every ZeRO stage, the gradient norm
is reported at every stage, and clipping is what our config says (DeepSpeed's own default is 1.0).
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import CompileMode, ConfigError, OptimConfig, ParallelConfig, Precision
from data.loader import Batch
from model.compiled import compile_layers, graphs_compiled
from model.transformer import Block, Transformer
from train.distributed import Ranks, share_rows
from train.fragments import Fragment, FragmentFolder
from train.optim import build_optimizer
from train.sharding import fragments, load_fragments

_BUCKET = 500_000_000  # elements; DeepSpeed's own default, allocated whole, so a small model must ask for less


def _deepspeed(device: torch.device) -> ModuleType:
    """The package, told its accelerator first: it decides at import, and would take a GPU that we were told to leave."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Its collectives are called by names that torch has renamed: nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # Only inference all-reduce uses this operator, and its first use compiles for half a minute.
    setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # noqa: B010
    return deepspeed


def deepspeed_config(parallel: ParallelConfig, optim: OptimConfig, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's dict. Accumulation stays 1 there: `Engine` states every boundary itself, so stages may differ in it."""
    bucket = min(_BUCKET, num_parameters)
    return {
        "train_micro_batch_size_per_gpu": parallel.micro_batch_rows,
        "gradient_accumulation_steps": 1,
        # Without ZeRO the engine clips by itself, see `Engine._plain_step`.
        "gradient_clipping": optim.clip_norm if parallel.zero_stage else 0.0,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "bf16": {"enabled": parallel.precision is Precision.BF16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }


@contextlib.contextmanager
def processes(ranks: Ranks) -> Iterator[None]:
    """Inside it, this process is in the group of all ranks (NCCL on GPUs, gloo on CPUs) and has its share of the cores.

    Raises ConfigError where the ranks cannot meet: another launch has the port, or the main node is not reached.
    """
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    package = _deepspeed(ranks.device)
    try:
        package.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())
        raise ConfigError(f"the ranks cannot meet at {where} ({reason}); deepspeed --master_port=N takes another port") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Gradient norm before clipping (not finite where the step was skipped) and whether the weights moved."""

    grad_norm: float
    skipped: bool


class Engine:
    """A model and its optimizer under DeepSpeed: micro-steps, one optimizer step, its state.

    DeepSpeed is not told of sequence parallelism: to it all ranks are data-parallel ones, over which it averages gradients and shards
    states at every ZeRO stage alike. Told of a sequence group, it would sum over it at stages 0 to 2 and average at stage 3.
    """

    def __init__(self, model: Transformer, *, parallel: ParallelConfig, optim: OptimConfig, ranks: Ranks) -> None:
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._ranks = ranks
        self._stage = parallel.zero_stage
        self._clip_norm = optim.clip_norm
        share_rows(model, parallel.sequence_parallel)
        on_gpu = ranks.device.type == "cuda"
        self._is_compiled = parallel.compile is CompileMode.ALWAYS or (parallel.compile is CompileMode.AUTO and on_gpu)
        self._graphs_before = graphs_compiled()
        package = _deepspeed(ranks.device)
        if self._is_compiled:
            compile_layers(model)
            if parallel.zero_stage == 3:  # a layer's weights are gathered at once: by its linear maps' hooks it would be inside the graphs
                package.utils.set_z3_leaf_modules(model, [Block])
        self._engine, self._optimizer, _, _ = package.initialize(
            model=model,
            optimizer=build_optimizer(model, optim),
            config=deepspeed_config(parallel, optim, num_parameters),
            dist_init_required=False,
        )

    @property
    def module(self) -> Transformer:
        """The model itself; under ZeRO-3 its parameters are shards."""
        return self._engine.module

    def micro_step(self, batch: Batch, *, weight: float, last: bool) -> torch.Tensor:
        """Forward and backward of `weight` × the summed loss of one micro-batch; returns the summed loss,
        fp32 on the device, so that nothing waits for it here. Ranks that share rows give the same batch; the loss is of their own tokens.

        `last` marks the micro-batch before the optimizer step. DeepSpeed averages gradients over ranks and never over
        accumulation here, so `weight = world_size / targets of the whole step` gives the mean over all its targets.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        losses = self._engine(batch.tokens.flatten(), batch.positions.flatten(), batch.cu_seqlens, batch.labels.flatten())
        loss = losses.sum()
        self._engine.backward(loss * weight, scale_wrt_gas=False)
        return loss.detach()

    @torch.no_grad()
    def losses(self, batch: Batch) -> torch.Tensor:
        """Losses of this rank's tokens [rows * seq_len / sequence_parallel], fp32, without a backward pass."""
        return self._engine(batch.tokens.flatten(), batch.positions.flatten(), batch.cu_seqlens, batch.labels.flatten())

    def graphs_compiled(self) -> int:
        """Graphs of torch.compile since this engine was made, on this rank; each new one held up a step."""
        return graphs_compiled() - self._graphs_before if self._is_compiled else 0

    def step(self, lr: float) -> StepResult:
        """The optimizer step at this learning rate. A non-finite gradient leaves weights and moments as they were."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            return self._plain_step()
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        return StepResult(grad_norm=float(self._engine.get_global_grad_norm()), skipped=self._engine.skipped_steps > skipped_before)

    def _plain_step(self) -> StepResult:
        # Without ZeRO, fp32 DeepSpeed neither reports a norm nor skips: gradients are whole on every rank, so we see to it.
        parameters = list(self.module.parameters())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        skipped = not bool(torch.isfinite(norm))
        if skipped:
            self.module.zero_grad(set_to_none=True)  # AdamW leaves a parameter without a gradient alone
        elif self._clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        self._engine.step()
        return StepResult(grad_norm=float(norm), skipped=skipped)

    def fragments(self) -> list[Fragment]:
        """This rank's share of the fp32 weights and of Adam's moments: views, which the next step changes."""
        return fragments(self.module, self._optimizer, zero_stage=self._stage)

    def load(self, saved: FragmentFolder, *, updates: int) -> None:
        """Takes weights and moments that any layout has saved after `updates` steps that were not skipped; every rank calls it.

        The optimizer's settings stay those of its config. Raises ConfigError where something lacks.
        """
        load_fragments(self.module, self._optimizer, saved, zero_stage=self._stage, updates=updates)
