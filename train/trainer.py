"""One optimizer step after the other: the place in the run, the stream, the counters, and what each step reports."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from configs.mapping import to_mapping
from configs.schema import ConfigError, RunConfig, StageConfig
from data.loader import Batch, OpenCorpus, build_loader, heldout_rows, require_documents
from data.mix import MixedStream
from data.shards import Corpus
from model.accounting import training_flops
from model.transformer import Transformer
from train.checkpoint import TrainingState
from train.distributed import Ranks, gather_objects, sum_over_ranks
from train.engine import Engine
from train.evaluate import HeldoutLosses, heldout_losses
from train.gates import by_layer, heldout_gates
from train.gpus import peak_flops
from train.memory import stage_bytes
from train.metrics import Metrics, memory_gib
from train.optim import learning_rate
from train.run_dir import HELDOUT, git_state, write_atomically
from train.stages import Place, place_of


class Trainer:
    """The state that moves with each optimizer step: place in the run, stream, counters."""

    def __init__(self, run: RunConfig, ranks: Ranks, corpus: OpenCorpus, engine: Engine, state: TrainingState | None) -> None:
        self.run, self.ranks, self.corpus, self.engine = run, ranks, corpus, engine
        self.done = state.step if state else 0
        self.skipped = state.skipped if state else 0
        self.skipped_in_a_row = state.skipped_in_a_row if state else 0
        self._graphs = 0  # compiled so far
        # The stage of the last finished step: a switch is still ahead.
        self._enter(place_of(run, max(self.done - 1, 0)).stage, stream=state.stream if state else None)

    def _enter(self, stage: StageConfig, stream: dict[str, Any] | None) -> None:
        """Sets model and stream to a stage; weights, optimizer and the place in the corpus, which `stream` says, stay."""
        enter_stage(self.engine.module, self.run, stage)
        self.stage = stage
        # Ranks that share rows are one to the data.
        parallel = self.run.parallel
        group, groups = self.ranks.rank // parallel.sequence_parallel, parallel.data_parallel(self.ranks.world_size)
        self.loader = build_loader(
            self.corpus,
            seq_len=stage.seq_len,
            rows_per_step=stage.rows,
            micro_batch_rows=self.run.micro_batch_rows(stage, self.ranks.world_size),
            rank=group,
            world_size=groups,
            seed=self.run.seed,
            mix=stage.mix,
            run_mixes=[other.mix for other in self.run.stages],
            gather=gather_objects,
            state=stream,
        )
        self._heldout: list[Batch] = []
        if self.run.evaluation.rows:
            self._heldout = heldout_rows(self.corpus, seq_len=stage.seq_len, rows=self.run.evaluation.rows, rank=group, world_size=groups)

    def step(self, metrics: Metrics) -> None:
        """One optimizer step and its line of metrics; a step with a non-finite loss or gradient is skipped and named."""
        place = place_of(self.run, self.done)
        if place.is_switch:
            self._switch(place, metrics)
        started = time.perf_counter()
        batches = self.loader.next_step()
        data_wait = time.perf_counter() - started

        weight = self.ranks.world_size / batches[0].step_targets
        losses = [self.engine.micro_step(batch.to(self.ranks.device), weight=weight, last=batch is batches[-1]) for batch in batches]
        tokens = place.tokens_before + self.stage.batch_tokens
        lr = self.stage.lr_scale * learning_rate(self.run.optim, tokens, self.run.total_tokens)
        result = self.engine.step(lr)

        flops = training_flops(self.run.model, self.engine.module.attention, _piece_lengths(batches))
        counts = self.loader.count(batches)
        loss, *of_rows = sum_over_ranks([float(sum(losses)), flops.dense_equivalent, flops.executed, *counts.values()], self.ranks.device)
        loss /= batches[0].step_targets
        # A loss is of a rank's own tokens; the others are of whole rows, which each of the ranks that share them has counted.
        dense, executed, *counted = (value / self.run.parallel.sequence_parallel for value in of_rows)
        self.done += 1
        self._count_skips(result.skipped, loss, batches, metrics)
        seconds = time.perf_counter() - started
        peak = peak_flops(self.ranks.device)
        utilised = peak * self.ranks.world_size * seconds if peak else None
        graphs_before, self._graphs = self._graphs, self.engine.graphs_compiled()
        metrics.step(
            {
                "step": self.done,
                "loss": loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "tokens": tokens,
                "stage": self.stage.name,
                "context": self.stage.seq_len,
                "tokens_per_second": self.stage.batch_tokens / seconds,
                "flops_executed_per_second": executed / seconds,
                "mfu_dense_equivalent": dense / utilised if utilised else None,
                "mfu_executed": executed / utilised if utilised else None,
                "memory_gib": memory_gib(self.ranks.device),
                "skipped_steps": self.skipped,
                "recompiles": self._graphs - graphs_before,
                "data_wait": data_wait / seconds,
                "padding": counted[-1] / self.stage.batch_tokens,
                "tokens_by": {key: int(number) for key, number in zip(counts, counted, strict=True) if key != "padding"},
                "epochs": self.loader.epochs(),
                "step_seconds": seconds,
            }
        )

    def _count_skips(self, skipped: bool, loss: float, batches: list[Batch], metrics: Metrics) -> None:
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        documents = sorted({document for part in gather_objects(self.loader.labels(batches)) for document in part})
        metrics.event("skipped", self.done, loss=loss, in_a_row=self.skipped_in_a_row, documents=documents)
        if self.skipped_in_a_row >= self.run.max_skipped_in_a_row:
            raise ConfigError(
                f"max_skipped_in_a_row={self.run.max_skipped_in_a_row}: that many steps in a row up to step {self.done} had a non-finite "
                f"loss or gradient; the last one held training documents {documents[:20]}"
            )

    def _switch(self, place: Place, metrics: Metrics) -> None:
        """Enters the next stage; the loss on either side of it is of the same held-out rows, those of the stage before."""
        rows = self._heldout
        before = self._losses(rows).loss if rows else None
        self._enter(place.stage, self.loader.state_dict())
        after = self._losses(rows).loss if rows else None
        metrics.event("switch", self.done, stage=place.stage.name, loss_before=before, loss_after=after)

    def evaluate(self, metrics: Metrics) -> float | None:
        """Loss on the held-out rows, written as an `evaluation` event, and each row's as the newest HELDOUT; None where evaluation is
        off."""
        if not self._heldout:
            return None
        found = self._losses(self._heldout)
        if self.ranks.is_main:
            text = json.dumps({"step": self.done, "context": self.stage.seq_len, **found.to_mapping()})
            write_atomically(Path(self.run.run_dir) / HELDOUT, f"{text}\n")
        metrics.event("evaluation", self.done, heldout_loss=found.loss, context=self.stage.seq_len, by_position=found.by_position)
        return found.loss

    def _losses(self, rows: list[Batch]) -> HeldoutLosses:
        return heldout_losses(self.engine, rows, self.ranks, bucket=self.run.evaluation.position_bucket)

    def measure_gates(self, metrics: Metrics) -> None:
        """Statistics of MoBA's gate on the held-out rows, written as a `gate` event where there is a choice: curves by layer, and
        each head's figures."""
        figures = heldout_gates(self.engine, self._heldout, self.ranks, self.run.evaluation.gate_queries)
        if figures:
            metrics.event("gate", self.done, context=self.stage.seq_len, **by_layer(figures), heads=figures)

    def state(self) -> TrainingState:
        """What a checkpoint after the last step keeps besides tensors."""
        return TrainingState(
            step=self.done,
            tokens=place_of(self.run, self.done).tokens_before,
            stream=self.loader.state_dict(),
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            world_size=self.ranks.world_size,
            tokenizer_hash=self.corpus.tokenizer_hash,
            config=to_mapping(self.run),
            git=git_state(),
        )


def _piece_lengths(batches: list[Batch]) -> list[int]:
    return [length for batch in batches for length in batch.cu_seqlens.diff().tolist()]


def enter_stage(model: Transformer, run: RunConfig, stage: StageConfig) -> None:
    """Gives the model the attention, the positions and the activations of a stage; its weights stay."""
    model.backend = stage.attention.backend.value
    model.workspace = stage.attention.workspace
    model.set_attention(stage.attention.per_layer(run.model.num_layers))
    model.set_rope(stage.rope)
    model.set_activation(stage.activation.per_layer(run.model.num_layers))


def check_heldout(run: RunConfig, corpus: OpenCorpus) -> None:
    """Raises ConfigError where the held-out documents do not fill a row of some stage, before the run comes there."""
    if run.evaluation.rows:
        for seq_len in sorted({stage.seq_len for stage in run.stages}):
            heldout_rows(corpus, seq_len=seq_len, rows=1)


def check_mixes(run: RunConfig, corpus: OpenCorpus) -> None:
    """Raises ConfigError where a prepared corpus does not have what the mix of some stage asks for, before the run comes there."""
    if not isinstance(corpus, Corpus):
        return  # of streamed sources no more is known than `configs.checks` has checked
    mixes, table = [stage.mix for stage in run.stages], corpus.split("train")
    require_documents(corpus, table)
    for index, stage in enumerate(run.stages):
        try:
            MixedStream(table, stage.mix, mixes, seed=run.seed, seq_len=stage.seq_len)
        except ConfigError as error:
            raise ConfigError(f"stages.{index}.{error}") from None


def dry_run(run: RunConfig, engine: Engine, ranks: Ranks, first_step: int) -> None:
    """One synthetic micro-batch, of the stage still to come that needs most, with weight 0, before anything is written: memory trouble
    shows now, not at night. Raises ConfigError where it does not fit in the GPU's memory."""
    to_come = run.stages[place_of(run, first_step).index :]
    gpu = ranks.device.type == "cuda"
    stage = max(to_come, key=lambda stage: stage_bytes(run, stage, world_size=ranks.world_size, gpu=gpu).peak)
    shape = (run.micro_batch_rows(stage, ranks.world_size), stage.seq_len)
    enter_stage(engine.module, run, stage)
    tokens = torch.arange(shape[0] * shape[1]).reshape(shape) % run.model.vocab_size
    batch = Batch(
        tokens=tokens,
        labels=tokens,
        positions=torch.arange(stage.seq_len).expand(shape),
        cu_seqlens=torch.arange(0, tokens.numel() + 1, stage.seq_len, dtype=torch.int32),
        max_length=stage.seq_len,
        documents=(),
        num_targets=tokens.numel(),
        step_targets=tokens.numel() * ranks.world_size,
    )
    try:
        engine.micro_step(batch.to(ranks.device), weight=0.0, last=False)
        full = None
    except torch.cuda.OutOfMemoryError:
        full = memory_gib(ranks.device)
    worst = max((used for used in gather_objects(full) if used is not None), default=None)
    if worst is not None:
        key = "micro_batch_tokens" if run.parallel.micro_batch_tokens else "micro_batch_rows"
        raise ConfigError(
            f"parallel.{key}={getattr(run.parallel, key)}: {shape[0]} rows of seq_len={stage.seq_len} do not fit in a GPU's memory "
            f"({worst:.1f} GiB were in use); fewer rows, shorter rows, more of activation.rule, a higher ZeRO stage or bf16 would help"
        )
