"""What ranks that share rows compute, against one process: shared_rows CASES.json OUT.json, on any number of ranks.

For gradients, an SGD step of a huge learning rate is taken through the engine: the weights then show any factor that is wrong. Started
by hand where there are GPUs, it computes there, in fp32.
"""

import itertools
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.distributed as dist

from configs.layers import ACTIVATIONS
from configs.schema import ActivationConfig, Device, ModelConfig, OptimConfig, ParallelConfig
from data.batch import IGNORE, Batch
from model.accounting import exchange_bytes
from model.compiled import compile_layers
from model.memory import pass_bytes
from model.transformer import Transformer
from tests.model.helpers import build, tiny_config
from train import engine as train_engine
from train.calibrate import kept_bytes
from train.distributed import Ranks, find_ranks, run_to_end, share_rows, sum_over_ranks
from train.engine import Engine, processes
from train.evaluate import document_losses
from train.gates import heldout_gates

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
    activation: str
    """The rule of what layers keep."""
    compiled: bool
    """Whether what surrounds attention is."""


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
    if "activation" in case:
        model.set_activation(ActivationConfig(rule=case["activation"]).per_layer(model.config.num_layers))
    if case.get("compiled"):
        compile_layers(model, backend="aot_eager")
    engine = Engine(model, parallel=parallel, optim=OptimConfig(clip_norm=0.0), ranks=ranks)
    mine, losses = micro_batches[ranks.rank // case["degree"] :: parallel.data_parallel(ranks.world_size)], []
    for batch in mine:
        losses.append(engine.micro_step(batch.to(ranks.device), weight=ranks.world_size / batch.step_targets, last=batch is mine[-1]))
    engine.step(LR)
    (loss,) = sum_over_ranks([float(sum(losses)) / mine[0].step_targets], ranks.device)
    with gathered(model) if case["zero"] == 3 else nullcontext():
        return loss, {name: (before[name] - parameter.detach().cpu().double()) / LR for name, parameter in model.named_parameters()}


def gathered(model: Transformer) -> AbstractContextManager:
    """Inside it a rank has all of the parameters, of which ZeRO-3 leaves it a part."""
    import deepspeed  # it decides for a device as it is imported, and tests import this file

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


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


def scored(ranks: Ranks) -> float:
    """Largest difference, in nats, of a document's losses; neither its tokens nor those of its windows divide."""
    model, tokens = build(tiny_config(), "moba(8, 2)").to(ranks.device), np.random.default_rng(0).integers(96, size=203)
    alone = document_losses(model, tokens, context=51, device=ranks.device)
    share_rows(model, ranks.world_size)
    return float(np.abs(document_losses(model, tokens, context=51, device=ranks.device) - alone).max())


def gates(ranks: Ranks) -> dict[str, float]:
    """Statistics of gates: largest difference between ranks that share rows and such that do not, and between the heads of a layer."""
    config, figures = tiny_config(num_kv_heads=1), []
    for degree in (1, ranks.world_size):
        parallel = ParallelConfig(sequence_parallel=degree)
        engine = Engine(build(config, "moba(8, 2)").to(ranks.device), parallel=parallel, optim=OptimConfig(), ranks=ranks)
        found = heldout_gates(engine, batches(config, 3, 2), ranks, num_queries=20)
        figures.append(np.array(list(found.values())))
    alone, shared = figures
    return {"error": float(np.abs(shared - alone).max()), "between_heads": float(np.ptp(alone, axis=-1).max())}


def held(ranks: Ranks) -> dict[str, list[int]]:
    """Bytes that autograd keeps of a forward pass on this rank, and those reckoned, by rule."""
    found = {}
    config = tiny_config(num_kv_heads=1, key_conv=3, qk_norm=True)
    for rule, rows in itertools.product(("full", "moba(8, 2)", "sliding(7)"), (1, 2)):
        model = build(config, rule).to(ranks.device)
        share_rows(model, ranks.world_size)
        bounds = torch.arange(0, 960 * rows + 1, 960, dtype=torch.int32)
        positions = torch.arange(960, device=ranks.device).repeat(rows)
        tokens = torch.zeros_like(positions)
        shapes = {"rows": rows, "seq_len": 960, "itemsize": 4, "triton_workspace": 0, "sequence_parallel": ranks.world_size}
        shapes["gpu"] = ranks.device.type == "cuda"
        reckoned = pass_bytes(config, model.attention, model.activation, **shapes).activations

        def forward() -> torch.Tensor:
            result = model.hidden(tokens.clone(), positions.clone(), bounds)  # noqa: B023
            dist.barrier()  # a gloo thread lets go of the tensors of its last collective a moment after it is over
            return result

        found[f"{rule}, {rows}"] = [kept_bytes(model, forward), reckoned]
    return found


def sent(ranks: Ranks) -> dict[str, list[int]]:
    """Bytes that this rank gives others in a forward and backward pass of one layer, and those reckoned, by what the layer keeps."""
    config, degree, plain, counted, found = tiny_config(num_layers=1, num_kv_heads=1), ranks.world_size, dist.all_to_all_single, 0, {}

    def count(received: torch.Tensor, given: torch.Tensor, group: dist.ProcessGroup) -> None:
        nonlocal counted
        counted += given.nbytes * (degree - 1) // degree
        plain(received, given, group=group)

    dist.all_to_all_single = count
    model, positions = build(config).to(ranks.device), torch.arange(48, device=ranks.device)
    share_rows(model, degree)
    for kept in ACTIVATIONS:
        model.set_activation((kept,))
        counted = 0
        model(torch.zeros_like(positions), positions, torch.tensor([0, 48], dtype=torch.int32)).sum().backward()
        found[kept] = [counted, exchange_bytes(config, kept, tokens=48 // degree, degree=degree, itemsize=4)]
    dist.all_to_all_single = plain
    return found


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    ranks, plain_config = find_ranks(Device.AUTO), train_engine.deepspeed_config
    train_engine.build_optimizer = lambda model, optim: torch.optim.SGD(model.parameters(), lr=LR)
    train_engine.deepspeed_config = lambda *arguments: plain_config(*arguments) | {"zero_allow_untested_optimizer": True}
    with processes(ranks):
        errors = [compare(case, ranks) for case in json.loads(cases.read_text())]
        found = {"errors": errors, "scored": scored(ranks), "gates": gates(ranks), "held": held(ranks), "sent": sent(ranks)}
        if ranks.is_main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    run_to_end(main)
