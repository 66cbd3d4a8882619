"""Whether a kernel computes its attention: its output and gradients against fp64, on a reduced case, before any time is taken.

A kernel may be twice as wrong as plain torch in the kernel's own dtype. Queries whose choice hangs on the last bits of two scores are left
out: the gradient that comes back to them is zero, so that no other gradient depends on their choice either.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from configs.schema import AttentionKernel
from model.accounting import FULL
from model.ops.moba import select_blocks
from model.ops.moba.reference import seen_blocks
from scripts.attention_benchmark.cases import Attention, Case, draw_inputs

NAMES = ("out", "d_q", "d_k", "d_v")
# Relative rounding of a gate's block means: ours keep twice the 8 bits of bf16, or fp32's 24; FlashMoBA's are bf16.
_MEAN_ROUNDING = {row: 2.0**-8 if row is AttentionKernel.FLASH_MOBA else 2.0**-16 for row in AttentionKernel}
# How many times the rounding of a score, as its terms' roundings add up at random, two scores must differ by to be told apart.
_DEVIATIONS = 4
_ALLOWED = 2.0
# Scores held at once, in elements.
_SCORE_BUDGET = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Check:
    """Relative errors in root-mean-square, by `NAMES` (without gradients: `out` alone)."""

    num_tokens: int
    errors: dict[str, float]
    """Of the kernel."""
    plain: dict[str, float]
    """Of plain torch in the same dtype."""
    left_out: float
    """Share of (query, head) pairs left out, their choice being a near-tie."""
    other_choices: float | None = None
    """Share of the gate's choices that are none of fp64's; None where there is no choice, or the row's gate cannot be asked."""

    @property
    def worst(self) -> str:
        """The name whose error goes furthest beyond what is allowed, or comes nearest to it."""
        return max(self.errors, key=self._excess)

    @property
    def excess(self) -> float:
        """By how much the worst error is more than allowed; infinite for one that is NaN."""
        return self._excess(self.worst)

    @property
    def problem(self) -> str:
        """What is wrong; empty where nothing is."""
        name = self.worst
        return f"error {self.errors[name]:.2g} of {name} (allowed: {_ALLOWED * self.plain[name]:.2g})" if self.excess > 0 else ""

    def _excess(self, name: str) -> float:
        excess = self.errors[name] - _ALLOWED * self.plain[name]
        return math.inf if math.isnan(excess) else excess


def check(row: AttentionKernel, attention: Attention, case: Case, device: torch.device) -> Check:
    """Runs the row's `attention` on the inputs of `case`, a reduced one; gradients are checked where the config has them measured."""
    q, k, v, d_out = draw_inputs(case, device)
    wanted = case.config.backward
    left_out = near_ties(q.detach(), k.detach(), case, rounding=_MEAN_ROUNDING[row])
    d_out.masked_fill_(left_out[..., None], 0)
    exact, plain = (moba_by_rows(q, k, v, d_out, case, compute=dtype, backward=wanted) for dtype in (torch.float64, q.dtype))
    out = attention(q, k, v)
    fast = dict(zip(NAMES, (out.detach(), *(torch.autograd.grad(out, (q, k, v), d_out) if wanted else ()))))
    for results in (exact, plain, fast):
        results["out"] = results["out"].masked_fill(left_out[..., None], 0)
    errors, plain_errors = ({name: _distance(results[name], exact[name]) for name in exact} for results in (fast, plain))
    others = other_choices(q, k, case) if row is AttentionKernel.TRITON and not case.is_full else None
    share = left_out.double().mean().item()
    return Check(num_tokens=case.num_tokens, errors=errors, plain=plain_errors, left_out=share, other_choices=others)


def other_choices(q: Tensor, k: Tensor, case: Case) -> float:
    """Share of the blocks chosen by the gate of the `triton` backend that fp64 does not choose."""
    block_size, topk = _sizes(case)
    choose = partial(select_blocks, block_size=block_size, topk=topk, cu_seqlens=torch.tensor(case.bounds, dtype=torch.int32))
    chosen, exact = choose(q, k, backend="triton"), choose(q.detach().double(), k.detach().double())
    is_other = chosen >= 0
    for slot in range(exact.shape[-1]):
        is_other &= chosen != exact[..., slot, None]
    return is_other.sum().item() / max(1, int((chosen >= 0).sum()))


def _distance(x: Tensor, exact: Tensor) -> float:
    distance, size = (x.double() - exact).norm().item(), exact.norm().item()
    return distance / size if size else distance  # a query with one token to see has no gradient


def moba_by_rows(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, case: Case, *, compute: torch.dtype, backward: bool) -> dict[str, Tensor]:
    """What `moba_reference` and autograd give, by `NAMES`, in fp64: some queries of one key/value head at a time, in bounded memory.

    Products and softmax are plain torch in `compute`, of blocks chosen in fp64; sums over the parts are taken in fp64.
    """
    scale, group = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    block_size, topk = _sizes(case)
    out, d_q, d_k, d_v = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, q, k, v))
    for (start, end), kv_head in itertools.product(itertools.pairwise(case.bounds), range(k.shape[1])):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        q_doc, k_doc = (x.detach()[start:end, part].double() for x, part in ((q, heads), (k, slice(kv_head, kv_head + 1))))
        seen = seen_blocks(q_doc, k_doc.expand(-1, group, -1), block_size, topk)  # [L, G, n_blocks]
        rows = max(1, _SCORE_BUDGET // ((end - start) * group))
        for first in range(start, end, rows):
            queries = slice(first, min(first + rows, end))
            keys = slice(start, queries.stop)
            position = torch.arange(queries.stop - start, device=q.device)
            causal = position[first - start :, None, None] >= position
            visible = seen[first - start : queries.stop - start][..., position // block_size] & causal  # [R, G, S]
            parts = (q[queries, heads], k[keys, kv_head], v[keys, kv_head])
            q_part, k_part, v_part = (x.detach().to(compute).requires_grad_(backward) for x in parts)
            scores = torch.einsum("qgd,kd->qgk", q_part, k_part) * scale
            probs = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
            part = torch.einsum("qgk,kd->qgd", probs, v_part)
            out[queries, heads] = part.detach().double()
            if backward:
                grads = torch.autograd.grad(part, (q_part, k_part, v_part), d_out[queries, heads].to(compute))
                d_q[queries, heads] = grads[0].double()
                d_k[keys, kv_head] += grads[1]
                d_v[keys, kv_head] += grads[2]
    return dict(zip(NAMES, (out, d_q, d_k, d_v) if backward else (out,)))


def _sizes(case: Case) -> tuple[int, int]:
    """Block size and top-k; dense attention is MoBA with one block a document."""
    return (case.num_tokens, 1) if case.attention == FULL else (case.attention.block_size, case.attention.topk)


def near_ties(q: Tensor, k: Tensor, case: Case, *, rounding: float) -> Tensor:
    """Whether a gate whose block means carry the relative `rounding` may choose other blocks than fp64: bool `[T, Hq]`."""
    block_size, topk = _sizes(case)
    num_past, group = topk - 1, q.shape[1] // k.shape[1]
    near = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    for start, end in itertools.pairwise(case.bounds):
        position = torch.arange(end - start, device=q.device)
        for head in range(q.shape[1]):
            q_doc, k_doc = q[start:end, head].double(), k[start:end, head // group].double()
            means = torch.stack([block.mean(dim=0) for block in k_doc.split(block_size)])
            is_past = torch.arange(len(means), device=q.device) < position[:, None] // block_size  # [L, n_blocks]
            ranked = (q_doc @ means.T).masked_fill(~is_past, float("-inf")).sort(dim=-1, descending=True)
            if num_past and len(means) > num_past:
                doubt = _DEVIATIONS * rounding * (q_doc.square() @ means.square().T).sqrt()
                last, next_one = (doubt.gather(-1, ranked.indices[:, n, None])[:, 0] for n in (num_past - 1, num_past))
                gap = ranked.values[:, num_past - 1] - ranked.values[:, num_past]  # infinite, or NaN, where there is no choice
                near[start:end, head] = gap < torch.maximum(last, next_one)
    return near
