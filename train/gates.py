"""Statistics of MoBA's gate in a model that reads text: on held-out rows while it is trained, on held-out documents afterwards."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from data.loader import Batch
from model.ops.moba import GATE_STATISTICS, GateStatistics, gate_statistics
from model.transformer import Transformer
from train.distributed import Ranks, sum_over_ranks
from train.engine import Engine

GateFigures = dict[str, list[list[float] | None]]
"""By name, as in `GATE_STATISTICS`: each layer's heads, None where the layer is not MoBA; empty where no query had a choice."""


def heldout_gates(engine: Engine, batches: Sequence[Batch], ranks: Ranks, num_queries: int) -> GateFigures:
    """Of the held-out rows, over all ranks; every rank holds equally many `batches`, and samples `num_queries` of each.

    Ranks that share rows hold the same ones, and sample the same queries.
    """
    model, found = engine.module, _nothing(engine.module)
    for batch in batches:
        counts = batch.num_targets > 0  # otherwise a row that is there for its shape alone
        with _adding(found, model, num_queries) if counts else contextlib.nullcontext():
            engine.losses(batch.to(ranks.device))
    return _figures(model, [_over_ranks(statistics, ranks) for statistics in found])


@torch.no_grad()
def document_gates(model: Transformer, documents: Sequence[np.ndarray], *, num_queries: int, device: torch.device) -> GateFigures:
    """Of `documents`, each the ids `[tokens]` of one, read whole; `num_queries` are sampled of each."""
    found = _nothing(model)
    with _adding(found, model, num_queries):
        for tokens in documents:
            ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
            model.hidden(ids, torch.arange(len(ids), device=device), torch.tensor([0, len(ids)], dtype=torch.int32))
    return _figures(model, found)


def _nothing(model: Transformer) -> list[GateStatistics]:
    return [GateStatistics.none(model.config.num_heads, torch.device("cpu"))] * model.config.num_layers


@contextlib.contextmanager
def _adding(found: list[GateStatistics], model: Transformer, num_queries: int) -> Iterator[None]:
    """Inside it, what the model reads is added to `found`, layer by layer."""

    def add(layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
        attention = model.attention[layer]
        if attention.kind == "moba":
            sizes = {"block_size": attention.block_size, "topk": attention.topk, "num_queries": num_queries}
            more = gate_statistics(q, k, cu_seqlens=cu_seqlens, **sizes)
            found[layer] += _share(model, GateStatistics(sums=more.sums.cpu(), counts=more.counts.cpu()))

    with model.observed(add):
        yield


def _share(model: Transformer, found: GateStatistics) -> GateStatistics:
    """Of what a layer's heads on this rank have found, the share in the sum over all ranks: its columns, and its part of the counts,
    which the ranks that share a row have in common."""
    ranks = model.sequence_parallel
    if ranks is None:
        return found
    num_heads = found.sums.shape[1]
    before, after = ranks.rank * num_heads, (ranks.degree - 1 - ranks.rank) * num_heads
    return GateStatistics(sums=pad(found.sums, (before, after)), counts=found.counts / ranks.degree)


def _over_ranks(found: GateStatistics, ranks: Ranks) -> GateStatistics:
    flat = sum_over_ranks([*found.sums.flatten().tolist(), *found.counts.tolist()], ranks.device)
    sums, counts = torch.tensor(flat, dtype=torch.float64).split([found.sums.numel(), found.counts.numel()])
    return GateStatistics(sums=sums.view_as(found.sums), counts=counts)


def _figures(model: Transformer, found: Sequence[GateStatistics]) -> GateFigures:
    means = [statistics.means() for statistics in found]
    return {name: [of.get(name) for of in means] for name in GATE_STATISTICS} if any(means) else {}


def by_layer(figures: GateFigures) -> dict[str, dict[str, float]]:
    """The mean over heads of each statistic, for each layer that has one: `{"mass": {"layer_0": …}}`."""
    return {
        name: {f"layer_{layer}": sum(heads) / len(heads) for layer, heads in enumerate(layers) if heads} for name, layers in figures.items()
    }
