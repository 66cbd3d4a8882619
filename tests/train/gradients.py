"""Gradients of every parameter under layouts of ranks, against one process in fp64: gradients CASES.json OUT.json, on any number of ranks.

An SGD step of a huge learning rate is taken through the engine, so that the weights show each gradient with any factor that is wrong.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import deepspeed
import torch
from torch.utils.checkpoint import checkpoint

from configs.schema import Device, ModelConfig, OptimConfig, ParallelConfig
from data.batch import IGNORE, Batch
from model.transformer import Transformer
from tests.model.helpers import build, tiny_config
from train import engine as train_engine
from train.distributed import Ranks, find_ranks, run_to_end, sum_over_ranks
from train.engine import Engine, processes

# Pieces of rows: few end where a rank's stretch does, which is 24 or 12 tokens; one has a single token.
ROWS = ([48], [5, 1, 30, 12], [17, 31], [24, 24], [3, 3, 42], [47, 1])
LR = 64.0  # a power of two


class Case(TypedDict, total=False):
    """One layout and model."""

    zero: int
    degree: int
    """Ranks that share rows."""
    rule: str
    micro_batches: int
    """Of each rank."""
    rows: int
    """In a micro-batch; 1 where it is left out."""
    nope: str
    model: dict
    """What differs from `tiny_config`."""
    blocks: str
    """`checkpointed` or `compiled`."""


def batches(config: ModelConfig, number: int, rows: int) -> list[Batch]:
    """Random tokens; each piece's last token has a label too, as in a cut document, but in the second row of `ROWS`."""
    generator, made = torch.Generator().manual_seed(1), []
    for first in range(0, number * rows, rows):
        pieces = [ROWS[row % len(ROWS)] for row in range(first, first + rows)]
        bounds = torch.tensor([0, *(length for row in pieces for length in row)]).cumsum(0)
        tokens, labels = torch.randint(config.vocab_size, (2, rows, 48), generator=generator)
        if first == rows:
            labels.view(-1)[bounds[1:] - 1] = IGNORE
        made.append(
            Batch(
                tokens=tokens,
                labels=labels,
                positions=torch.cat([torch.arange(length) for length in bounds.diff().tolist()]).view(rows, 48),
                cu_seqlens=bounds.to(torch.int32),
                max_length=int(bounds.diff().max()),
                documents=(),
                num_targets=int((labels != IGNORE).sum()),
                step_targets=0,
            )
        )
    targets = sum(batch.num_targets for batch in made)
    return [replace(batch, step_targets=targets) for batch in made]


def expected(model: Transformer, micro_batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of a step and its gradients in fp64, without ranks and without DeepSpeed."""
    model, total = model.double(), 0.0
    for batch in micro_batches:
        losses = model(batch.tokens.flatten(), batch.positions.flatten(), batch.cu_seqlens, batch.labels.flatten())
        loss = losses.double().sum() / batch.step_targets
        loss.backward()
        total += float(loss)
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def found(case: Case, model: Transformer, micro_batches: list[Batch], ranks: Ranks) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of a step of the engine."""
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    parallel = ParallelConfig(zero_stage=case["zero"], sequence_parallel=case["degree"])
    for layer in model.layers:
        if case.get("blocks") == "checkpointed":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        elif case.get("blocks") == "compiled":
            layer.compile(backend="aot_eager")
    engine = Engine(model, parallel=parallel, optim=OptimConfig(clip_norm=0.0), ranks=ranks)
    mine, losses = micro_batches[ranks.rank // case["degree"] :: parallel.data_parallel(ranks.world_size)], []
    for batch in mine:
        losses.append(engine.micro_step(batch, weight=ranks.world_size / batch.step_targets, last=batch is mine[-1]))
    engine.step(LR)
    (loss,) = sum_over_ranks([float(sum(losses)) / mine[0].step_targets], ranks.device)
    gathered = deepspeed.zero.GatheredParameters(list(model.parameters())) if case["zero"] == 3 else nullcontext()
    with gathered:
        return loss, {name: (before[name] - parameter.detach().double()) / LR for name, parameter in model.named_parameters()}


def compare(case: Case, ranks: Ranks) -> dict[str, float]:
    """Relative errors: of the loss, and of each parameter's gradient in the Euclidean norm."""
    config = tiny_config(**case.get("model", {}))
    models = [build(config, case["rule"], nope=case.get("nope", "")) for _ in range(2)]
    groups = ranks.world_size // case["degree"]
    micro_batches = batches(config, case["micro_batches"] * groups, case.get("rows", 1))
    loss, gradients = found(case, models[0], micro_batches, ranks)
    right_loss, right = expected(models[1], micro_batches)
    assert gradients.keys() == right.keys()
    return {"loss": abs(loss / right_loss - 1)} | {
        name: float((gradients[name] - right[name]).norm() / right[name].norm()) for name in right
    }


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    ranks, plain_config = find_ranks(Device.CPU), train_engine.deepspeed_config
    train_engine.build_optimizer = lambda model, optim: torch.optim.SGD(model.parameters(), lr=LR)
    train_engine.deepspeed_config = lambda *arguments: plain_config(*arguments) | {"zero_allow_untested_optimizer": True}
    with processes(ranks):
        errors = [compare(case, ranks) for case in json.loads(cases.read_text())]
        if ranks.is_main:
            out.write_text(json.dumps(errors))


if __name__ == "__main__":
    run_to_end(main)
