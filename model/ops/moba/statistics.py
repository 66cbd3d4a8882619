"""What MoBA's gate does with given queries and keys, beside full attention and beside FlashMoBA's model of such a gate.

Shape letters: T tokens, Hq query heads, Hkv key/value heads, D head dimension; of one document: c sampled queries, L tokens, n blocks.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.ops.checks import check_positive_int, check_routing
from model.ops.moba.routing import block_layout, block_means, select_blocks

GATE_STATISTICS = {
    "mass": "share of full attention's probability that falls on the tokens seen",
    "best_mass": "the same for the choice that would catch most of it",
    "entropy": "entropy of how often blocks are chosen, over that of equal use",
    "never_chosen": "share of the blocks that no query chooses",
    "margin": "score of the last chosen block above the first that is not, in standard deviations of two blocks' difference",
    "snr": "score of the block with most probability above the mean of the others, in the same unit: FlashMoBA's SNR",
    "recall": "share of queries that choose the block with most probability",
    "predicted_recall": "the same as FlashMoBA's SNR predicts it",
}
# Probabilities held at once, in elements.
_BUDGET = 1 << 24


@dataclass(frozen=True, kw_only=True)
class GateStatistics:
    """Statistics of one layer, in the order of `GATE_STATISTICS`; what several calls find can be added."""

    sums: Tensor
    """Sum of each one over what it is counted over, fp64 `[statistics, Hq]`."""
    counts: Tensor
    """What it is counted over, fp64 `[statistics]`: sampled queries; for the use of blocks, the blocks that can be chosen."""

    @classmethod
    def none(cls, num_heads: int, device: torch.device) -> "GateStatistics":
        """Nothing yet."""
        sums = torch.zeros(len(GATE_STATISTICS), num_heads, dtype=torch.float64, device=device)
        return cls(sums=sums, counts=sums[:, 0].clone())

    def __add__(self, other: "GateStatistics") -> "GateStatistics":
        return GateStatistics(sums=self.sums + other.sums, counts=self.counts + other.counts)

    def means(self) -> dict[str, list[float]]:
        """Each statistic of each head; empty where no query had a choice."""
        if not self.counts.all():
            return {}
        return dict(zip(GATE_STATISTICS, (self.sums / self.counts[:, None]).tolist(), strict=True))


@torch.no_grad()
def gate_statistics(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    num_queries: int,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    seed: int = 0,
) -> GateStatistics:
    """Statistics of the gate on packed documents, q `[T, Hq, D]` and k `[T, Hkv, D]` as in `moba_attention`.

    Only documents count that have at least `topk` past blocks at their end, and of the queries only those that have them: the
    others see all there is. Use of blocks counts all queries; the rest counts `num_queries` of them, drawn with `seed`, whose
    attention is computed in full. With `topk` 1 nothing is chosen, and nothing counted.

    The unit of `margin` and `snr` is FlashMoBA's (arXiv 2511.11571): if the scores of single keys of other blocks are independent
    with a standard deviation of s, the difference of two blocks' scores has one of s sqrt(2 / block_size). `snr` is then
    its Δμ_eff sqrt(D / (2 block_size)), with the mean and s as they are among the query's past keys outside that block.
    `predicted_recall` is the chance that fewer than topk-1 of the other past blocks outrank it: the score to be outranked is known,
    so each does with probability Φ(-sqrt(2) snr), whose mean over the score's own chance is the paper's Φ(-SNR).

    Raises ValueError naming the argument, its value and what is accepted.
    """
    check_positive_int(num_queries=num_queries)
    found = GateStatistics.none(q.shape[1], q.device)
    bounds = check_routing(q, k, cu_seqlens)
    chosen = select_blocks(q, k, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens)
    documents = [(start, end) for start, end in itertools.pairwise(bounds) if topk > 1 and (end - start - 1) // block_size >= topk]
    if not documents:
        return found
    having = torch.cat([torch.arange(start + topk * block_size, end) for start, end in documents])
    sampled = having[torch.randperm(len(having), generator=torch.Generator().manual_seed(seed))[:num_queries]].sort().values
    scale = softmax_scale or q.shape[-1] ** -0.5
    for start, end in documents:
        found += _use_of_blocks(chosen[start:end], (end - start - 1) // block_size)
        mine = sampled[(sampled >= start) & (sampled < end)]
        keys = k[start:end]
        means = block_means(keys, block_layout([0, len(keys)], block_size))
        for part in mine.split(max(1, _BUDGET // (q.shape[1] * len(keys)))):
            part = part.to(q.device)
            found += _of_queries(q[part], part - start, keys, means, chosen[part], block_size, scale)
    return found


def _collect(values: dict[str, Tensor], count: int) -> GateStatistics:
    """Sums over `count`, `[Hq]` each; the other statistics are 0."""
    found = GateStatistics.none(*next((len(value), value.device) for value in values.values()))
    for row, name in enumerate(GATE_STATISTICS):
        if name in values:
            found.sums[row] = values[name]
            found.counts[row] = count
    return found


def _use_of_blocks(chosen: Tensor, num_blocks: int) -> GateStatistics:
    """From the choices `[L, Hq, topk-1]` of one document's queries, among its first `num_blocks` blocks."""
    ids = chosen.permute(1, 0, 2).flatten(1)
    ones = (ids >= 0).to(torch.float64)
    use = torch.zeros(len(ids), num_blocks, dtype=torch.float64, device=ids.device).scatter_add_(1, ids.clamp(min=0), ones)
    share = use / use.sum(dim=1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(dim=1) / math.log(num_blocks)
    return _collect({"entropy": entropy * num_blocks, "never_chosen": (use == 0).sum(dim=1).double()}, num_blocks)


def _of_queries(
    q: Tensor, place: Tensor, k: Tensor, means: Tensor, chosen: Tensor, block_size: int, softmax_scale: float
) -> GateStatistics:
    """From queries `[c, Hq, D]` and their choices `[c, Hq, topk-1]`, at `place` int64 `[c]` in the document of k `[L, Hkv, D]` and
    means `[n, Hkv, D]`."""
    num_blocks, num_past = len(means), chosen.shape[-1]
    by_head = q.unflatten(1, (k.shape[1], -1)).to(means.dtype)  # [c, Hkv, G, D]
    logits = softmax_scale * torch.einsum("chgd,lhd->hgcl", by_head, k.to(means.dtype)).flatten(0, 1)  # [Hq, c, L]
    gate = softmax_scale * torch.einsum("chgd,nhd->hgcn", by_head, means).flatten(0, 1)  # [Hq, c, n]
    block = torch.arange(num_blocks, device=q.device)
    own = (place // block_size)[:, None]
    past, is_own = block < own, block == own  # [c, n]
    is_chosen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, chosen.transpose(0, 1), True)

    future = torch.arange(len(k), device=q.device) > place[:, None]
    padded = torch.nn.functional.pad(logits.masked_fill(future, -math.inf), (0, num_blocks * block_size - len(k)), value=-math.inf)
    mass = padded.unflatten(-1, (num_blocks, block_size)).logsumexp(dim=-1).double().softmax(dim=-1)
    past_mass = mass.masked_fill(~past, 0.0)
    own_mass = mass.masked_fill(~is_own, 0.0).sum(dim=-1)
    best, signal = past_mass.topk(num_past, dim=-1)
    signal = signal[..., :1]

    lowest = gate.masked_fill(~is_chosen, math.inf).amin(dim=-1)
    next_best = gate.masked_fill(~past | is_chosen, -math.inf).amax(dim=-1)
    noise_mean, noise_std = _noise(logits, past & (block != signal), block_size)
    unit = noise_std * math.sqrt(2 / block_size)
    snr = (gate.gather(-1, signal)[..., 0] - noise_mean) / unit
    values = {
        "mass": own_mass + (past_mass * is_chosen).sum(dim=-1),
        "best_mass": own_mass + best.sum(dim=-1),
        "margin": (lowest - next_best) / unit,
        "snr": snr,
        "recall": is_chosen.gather(-1, signal)[..., 0].double(),
        "predicted_recall": _fewer_than(num_past, (own[:, 0] - 1).double(), torch.special.ndtr(-math.sqrt(2) * snr)),
    }
    return _collect({name: value.sum(dim=1) for name, value in values.items()}, len(q))


def _noise(logits: Tensor, blocks: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, fp64 `[Hq, c]`, of the logits `[Hq, c, L]` of the keys in `blocks` bool `[Hq, c, n]`, all whole."""
    whole = logits.shape[-1] // block_size
    inside = blocks[..., :whole].repeat_interleave(block_size, dim=-1)
    kept = logits[..., : whole * block_size].double() * inside
    count = inside.sum(dim=-1)
    mean = kept.sum(dim=-1) / count
    squares = ((kept - mean[..., None]) * inside).square().sum(dim=-1)
    return mean, (squares / count).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _fewer_than(limit: int, trials: Tensor, chance: Tensor) -> Tensor:
    """P(X < limit) of a binomial X with `trials` `[c]` and `chance` `[Hq, c]`."""
    total = torch.zeros_like(chance)
    for hits in range(limit):
        ways = torch.lgamma(trials + 1) - math.lgamma(hits + 1) - torch.lgamma((trials - hits + 1).clamp_min(1))
        term = (ways + torch.xlogy(torch.tensor(float(hits)), chance) + torch.special.xlog1py(trials - hits, -chance)).exp()
        total += torch.where(trials >= hits, term, 0.0)
    return total.clamp(max=1.0)
