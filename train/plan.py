"""What a run will cost, before anything is allocated: steps, FLOPs, time, memory and communication of each stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.checks import check_run, check_vocabulary
from configs.layers import LayerAttention
from configs.mapping import nearest
from configs.schema import AttentionBackend, ConfigError, ParallelConfig, PlanConfig, Precision, RunConfig, StageConfig
from data.manifest import FILE_NAME
from data.mix import MixReport, report
from data.shards import Corpus
from model.accounting import TrainingFlops, parameter_counts, training_flops
from model.memory import PassBytes, effective, reach
from model.transformer import Transformer
from train import checkpoint
from train.crossover import Crossover, crossover
from train.engine import deepspeed_config
from train.gpus import GPUS
from train.initial import open_initial
from train.kernels import check_attention, compute_dtype, triton_refusal
from train.memory import stage_bytes
from train.optim import build_optimizer
from train.traffic import GATHERED, Exchange, Traffic, exchange, row_bytes, traffic
from train.trainer import check_heldout, check_mixes

# What a run is planned for, whether this machine has one or not.
_GPU = torch.device("cuda")
# The next rules for activations.
_KEEPS_LESS = {"none": ("selective", "full"), "selective": ("full",), "full": ("offload",)}


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What the engine holds on one rank at its fullest, at the end of a backward pass, in bytes."""

    weights: int
    """In the compute dtype; under ZeRO-3 the shard and what is gathered of the others."""
    gradients: int
    """With DeepSpeed's bucket for reducing them."""
    optimizer: int
    """Adam's moments, and fp32 master weights where the optimizer keeps its own."""


def state_bytes(parallel: ParallelConfig, *, num_parameters: int, world_size: int, accumulates: bool) -> StateBytes:
    """Bytes of weights, gradients and optimizer under DeepSpeed 0.19 as `train.engine` sets it up, padding left out.

    `accumulates`: a step has several micro-batches. Counted on the engine's own tensors at 1 and 2 ranks, see the tests.
    """
    item, whole, shard = compute_dtype(parallel.precision).itemsize, num_parameters, num_parameters / world_size
    bucket = item * reduce_bucket(parallel, num_parameters)
    if parallel.zero_stage == 0:  # fp32: AdamW on the model's own parameters
        return StateBytes(weights=4 * whole, gradients=4 * whole, optimizer=8 * whole)
    optimizer = math.ceil(12 * shard)  # every ZeRO optimizer has master weights of its own, also in fp32
    if parallel.zero_stage == 1 and parallel.precision is Precision.BF16:
        # DeepSpeed takes its BF16_Optimizer here, which shards no gradient: fp32 ones beside those of the backward pass.
        return StateBytes(weights=2 * whole, gradients=(4 + 2) * whole, optimizer=optimizer)
    if parallel.zero_stage == 1:  # while it accumulates the sum beside the newest, else the newest and the shard for the optimizer
        return StateBytes(weights=4 * whole, gradients=4 * whole + math.ceil(4 * (whole if accumulates else shard)), optimizer=optimizer)
    gradients = math.ceil(4 * shard) + bucket
    if parallel.zero_stage == 2:
        return StateBytes(weights=item * whole, gradients=gradients, optimizer=optimizer)
    gathered = item * min(whole, GATHERED) if world_size > 1 else 0
    return StateBytes(weights=math.ceil(item * shard) + gathered, gradients=gradients, optimizer=optimizer)


def reduce_bucket(parallel: ParallelConfig, num_parameters: int) -> int:
    """Elements of the buffer in which DeepSpeed reduces gradients."""
    optimization = deepspeed_config(parallel, RunConfig().optim, num_parameters)["zero_optimization"]
    return int(optimization["reduce_bucket_size"])


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage; FLOPs and seconds are of one optimizer step."""

    stage: StageConfig
    attention: tuple[LayerAttention, ...]
    micro_batch_rows: int
    """Rows in one forward pass of a rank, or of the ranks that share them."""
    micro_batches: int
    """Forward passes of a rank in a step."""
    flops: TrainingFlops
    """On all ranks."""
    seconds: float
    """Of computing."""
    states: StateBytes
    held: PassBytes
    sent: Traffic
    exchange: Exchange

    @property
    def tokens(self) -> int:
        """Trained on, whole steps."""
        return self.stage.steps * self.stage.batch_tokens

    @property
    def days(self) -> float:
        return self.seconds * self.stage.steps / 86400

    @property
    def memory(self) -> int:
        """Bytes at the peak, on one GPU."""
        return self.states.weights + self.states.gradients + self.states.optimizer + self.held.peak


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All stages, what each reads of a corpus that is prepared, the crossover of each MoBA setting (None: MoBA never won where it was
    measured), and what else is worth saying."""

    config: PlanConfig
    stages: tuple[StagePlan, ...]
    mixes: tuple[MixReport, ...]
    crossovers: dict[LayerAttention, Crossover | None]
    notes: tuple[str, ...]


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a run that passes the checks of training. Raises ConfigError as training would, before it allocates anything."""
    notes = check_plan(config)
    stages = tuple(_plan_stage(config, stage) for stage in config.stages)
    kinds = dict.fromkeys(kind for stage in stages for kind in stage.attention if kind.kind == "moba")
    crossovers = {kind: crossover(config.model, kind, gpu=config.gpu) for kind in kinds}
    for index, stage in enumerate(stages):
        notes += _stage_notes(config, stage, index)
    if config.parallel.precision is Precision.FP32:
        notes.append("parallel.precision=fp32: the time is that of bf16 matrix products; fp32 ones are slower")
    return Plan(config=config, stages=stages, mixes=_mixes(config, stages), crossovers=crossovers, notes=tuple(notes))


def check_plan(config: PlanConfig) -> list[str]:
    """All that training checks before its first step; returns what could not be checked here. Raises ConfigError."""
    if config.gpu not in GPUS:
        raise ConfigError(f"gpu={config.gpu}: is not known{nearest(config.gpu.upper(), list(GPUS))}; accepted: {', '.join(GPUS)}")
    check_run(config, world_size=config.num_gpus)
    check_attention(config, _GPU, world_size=config.num_gpus)
    with torch.device("meta"):
        model = Transformer(config.model, config.stages[0].attention.per_layer(config.model.num_layers), config.stages[0].rope)
    build_optimizer(model, config.optim)
    folder = config.data.prepared_dir
    corpus = _prepared(config)
    notes = []
    if config.init_from and Path(config.init_from).exists():
        open_initial(config, corpus)
    elif config.init_from:
        notes.append(f"init_from={config.init_from}: is not there yet, so model, RoPE and tokenizer were not checked against its weights")
    if config.data.streaming:
        return [*notes, "data.streaming=true: sources, vocabulary, held-out rows and resume are checked when the run reads them"]
    if corpus is None:
        said = "is not prepared yet, so vocabulary, held-out rows and resume were not checked against it"
        return [*notes, f"data.prepared_dir={folder}: {said}"]
    check_vocabulary(config, corpus=corpus.name, vocab_size=corpus.vocab_size)
    check_mixes(config, corpus)
    check_heldout(config, corpus)
    if config.resume not in ("auto", "never"):
        state = checkpoint.read_state(checkpoint.resolve(config.resume, lambda text: None))
        checkpoint.check_fits(state, config, tokenizer_hash=corpus.tokenizer_hash)
    return notes


def _prepared(config: PlanConfig, *, verify: bool | None = None) -> Corpus | None:
    """The prepared corpus that the run will read, where there is one already."""
    folder = Path(config.data.prepared_dir)
    return Corpus.open(folder, verify=verify) if not config.data.streaming and (folder / FILE_NAME).is_file() else None


def _mixes(config: PlanConfig, stages: Sequence[StagePlan]) -> tuple[MixReport, ...]:
    """What each stage reads; nothing where the corpus is not prepared."""
    corpus = _prepared(config, verify=False)  # `check_plan` has verified it
    if corpus is None:
        return ()
    table = corpus.split("train")
    return tuple(report(table, plan.stage.mix, tokens=plan.tokens, seq_len=plan.stage.seq_len) for plan in stages)


def _plan_stage(config: PlanConfig, stage: StageConfig) -> StagePlan:
    attention = stage.attention.per_layer(config.model.num_layers)
    micro_batch_rows = config.micro_batch_rows(stage, config.num_gpus)
    micro_batches = stage.rows // (config.parallel.data_parallel(config.num_gpus) * micro_batch_rows)
    flops = training_flops(config.model, attention, [stage.seq_len] * stage.rows)
    seconds = flops.executed / (config.num_gpus * GPUS[config.gpu].peak_flops * config.mfu)
    num_parameters = parameter_counts(config.model).total
    sent = traffic(
        config.parallel,
        num_parameters=num_parameters,
        world_size=config.num_gpus,
        micro_batches=micro_batches,
        rows=row_bytes(config, stage),
    )
    return StagePlan(
        stage=stage,
        attention=attention,
        micro_batch_rows=micro_batch_rows,
        micro_batches=micro_batches,
        flops=flops,
        seconds=seconds,
        states=state_bytes(
            config.parallel,
            num_parameters=num_parameters,
            world_size=config.num_gpus,
            accumulates=micro_batches > 1,
        ),
        held=stage_bytes(config, stage, world_size=config.num_gpus, gpu=True),
        sent=sent,
        exchange=exchange(config, sent, computing=seconds),
    )


def _stage_notes(config: PlanConfig, plan: StagePlan, index: int) -> list[str]:
    notes = []
    for kind in dict.fromkeys(plan.attention):
        if effective(kind, plan.stage.seq_len) != kind:
            notes.append(
                f"stages.{index}.attention: {kind} sees up to {reach(kind):,} tokens, and rows of stages.{index}.seq_len="
                f"{plan.stage.seq_len} have no more: it is full attention there, and computed as such; longer rows or smaller numbers "
                "make it sparse"
            )
        elif refused := _leaves_triton(config, plan.stage, kind):
            notes.append(f"stages.{index}.attention.backend=auto: takes torch for {kind}, slow on a GPU, as triton does not: {refused}")
    memory = GPUS[config.gpu].memory
    if plan.memory > memory:
        parts = {
            "weights": (plan.states.weights, "ZeRO 3 or more GPUs"),
            "gradients": (plan.states.gradients, "ZeRO 2 or 3"),
            "optimizer": (plan.states.optimizer, "ZeRO 1 or higher, or more GPUs"),
            "activations": (plan.held.activations, _smaller(config, plan, *_KEEPS_LESS.get(plan.stage.activation.rule, ()))),
            "a layer's backward pass": (plan.held.workspace, _smaller(config, plan)),
            "logits": (plan.held.logits, _smaller(config, plan)),
        }
        largest, (size, remedy) = max(parts.items(), key=lambda part: part[1][0])
        notes.append(
            f"stages.{index}: needs {plan.memory / 1e9:,.0f} GB a GPU, {config.gpu} has {memory / 1e9:.0f} GB; "
            f"most of it {'is' if largest.startswith('a ') else 'are'} {largest}, {size / 1e9:,.0f} GB: {remedy}"
        )
    return notes


def _leaves_triton(config: PlanConfig, stage: StageConfig, kind: LayerAttention) -> str | None:
    """Why `auto` gives a MoBA layer to another backend on a GPU; None where it does not, or is not what was asked for."""
    if kind.kind != "moba" or stage.attention.backend is not AttentionBackend.AUTO:
        return None
    return triton_refusal(config, stage, kind, _GPU, world_size=config.num_gpus)


def _smaller(config: PlanConfig, plan: StagePlan, *keeping: str) -> str:
    """What makes a micro-batch smaller; `keeping` are rules for activations that keep less."""
    bf16 = [] if config.parallel.precision is Precision.BF16 else ["parallel.precision=bf16"]
    key = "micro_batch_tokens" if config.parallel.micro_batch_tokens else "micro_batch_rows"
    rows = [f"a lower parallel.{key}"] if plan.micro_batch_rows > 1 else []
    shared = ["a higher parallel.sequence_parallel"] if config.num_gpus > config.parallel.sequence_parallel else []
    return " or ".join([*bf16, *(f"activation.rule={rule}" for rule in keeping), *rows, *shared, "shorter rows"])
