"""Blocks of packed documents and the choice of blocks per query (MoBA gate, arXiv 2502.13189 eq. 4-6).

Shape letters: T tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dimension, N blocks of all documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.ops.checks import check_backend, check_positive_int, check_routing
from model.ops.moba.triton.limits import refusal

ROUTING_BACKENDS = ("torch", "triton")
# Scores held at once while routing, in elements: bounds the memory at any T; the CPU's share is sized for its cache.
_SCORE_BUDGET = {"cpu": 1 << 19, "default": 1 << 26}


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Where the blocks of packed documents lie. Global block ids count through all documents; tensors are int64 on CPU.

    Blocks start at each document's first token, never cross documents, and only a document's last may be short.
    """

    block_size: int
    start: Tensor
    """First token of each block `[N]`."""
    length: Tensor
    """Tokens in each block `[N]`."""
    doc_first: Tensor
    """First block of each block's document `[N]`."""
    token_block: Tensor
    """Own block of each token `[T]`."""

    @property
    def num_blocks(self) -> int:
        return len(self.start)

    @property
    def max_doc_blocks(self) -> int:
        """Blocks in the document that has the most."""
        return int((torch.arange(self.num_blocks) - self.doc_first).max()) + 1


def block_layout(bounds: list[int], block_size: int) -> BlockLayout:
    """The block table of documents with boundaries `bounds` = `[0, ..., T]`."""
    edges = torch.tensor(bounds)
    doc_length = edges.diff()
    doc_blocks = (doc_length + block_size - 1) // block_size
    doc_first = (doc_blocks.cumsum(0) - doc_blocks).repeat_interleave(doc_blocks)
    in_doc = torch.arange(len(doc_first)) - doc_first
    start = edges[:-1].repeat_interleave(doc_blocks) + in_doc * block_size
    length = (edges[1:].repeat_interleave(doc_blocks) - start).clamp(max=block_size)
    token_block = torch.arange(len(start)).repeat_interleave(length)
    return BlockLayout(block_size=block_size, start=start, length=length, doc_first=doc_first, token_block=token_block)


def to_blocks(x: Tensor, layout: BlockLayout) -> Tensor:
    """`[T, Hkv, D]` cut into `[N, B, Hkv, D]`, short blocks padded with zeros."""
    offset = torch.arange(layout.block_size)
    token = layout.start[:, None] + offset
    padded = offset >= layout.length[:, None]
    blocks = x[token.clamp(max=len(x) - 1).to(x.device)]
    return blocks.masked_fill_(padded[:, :, None, None].to(x.device), 0)


def block_means(k: Tensor, layout: BlockLayout) -> Tensor:
    """Mean key of each block, `[N, Hkv, D]` in fp32 (fp64 for fp64 keys), from k `[T, Hkv, D]`."""
    compute = torch.promote_types(k.dtype, torch.float32)
    length = layout.length.to(k.device, compute)
    return to_blocks(k.detach(), layout).sum(dim=1, dtype=compute) / length[:, None, None]


def select_blocks(q: Tensor, k: Tensor, *, block_size: int, topk: int, cu_seqlens: Tensor | None = None, backend: str = "torch") -> Tensor:
    """The past blocks that each query attends to besides its own; no gradient.

    q `[T, Hq, D]`, k `[T, Hkv, D]`, cu_seqlens int32 `[n_docs+1]` or None (one document); `backend` "torch", or "triton" for
    the choice of that backend's own gate, where it serves.
    Returns int64 `[T, Hq, topk-1]`: block indices counted from 0 within the query's document, by descending score
    <q, mean key> (ties: the lower index first; of "triton" in no order), -1 where the query has fewer past blocks, last.
    Memory is linear in T. Raises ValueError naming the argument, its value and what is accepted.
    """
    check_backend(backend, ROUTING_BACKENDS)
    check_positive_int(block_size=block_size, topk=topk)
    bounds = check_routing(q, k, cu_seqlens)
    if backend == "triton" and (refused := refusal(q, k, num_docs=len(bounds) - 1, block_size=block_size, topk=topk)):
        raise ValueError(f"backend='triton': {refused}; backend='torch' takes others")
    layout = block_layout(bounds, block_size)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            chosen = _choose_by_kernel(q.detach(), k.detach(), bounds, block_size, num_past=topk - 1)
        else:
            chosen = choose_blocks(q, block_means(k, layout), layout, num_past=topk - 1)
    first = layout.doc_first[layout.token_block].to(q.device)[:, None, None]
    return torch.where(chosen >= 0, chosen - first, chosen)


def _choose_by_kernel(q: Tensor, k: Tensor, bounds: list[int], block_size: int, *, num_past: int) -> Tensor:
    """As `choose_blocks`, from q `[T, Hq, D]` and k `[T, Hkv, D]` by the gate of the `triton` backend, in no order."""
    from model.ops.moba.triton import gate, launch, plan  # Triton may be missing where its kernels are not used

    q, k = launch.aligned(q), launch.aligned(k)
    # All heads at once; what scales the softmax changes no choice.
    call = plan.call_of(q, k, tuple(bounds), block_size=block_size, topk=num_past + 1, softmax_scale=1.0, workspace=1 << 62)
    if not call.num_past:
        return torch.full((*q.shape[:2], num_past), -1, device=q.device)
    chosen = gate.choose_blocks(call, q, gate.block_means(call, k), range(call.num_heads))
    return torch.nn.functional.pad(chosen.transpose(0, 1).long(), (0, num_past - call.num_past), value=-1)


def choose_blocks(q: Tensor, means: Tensor, layout: BlockLayout, *, num_past: int) -> Tensor:
    """As `select_blocks`, with global block ids: int64 `[T, Hq, num_past]`, from q `[T, Hq, D]`, means `[N, Hkv, D]`."""
    num_tokens, num_heads, _ = q.shape
    chosen = torch.full((num_tokens, num_heads, num_past), -1, device=q.device)
    budget = _SCORE_BUDGET.get(q.device.type, _SCORE_BUDGET["default"]) // num_heads
    begin = 0
    while num_past and begin < num_tokens:
        end, first, last = _next_chunk(begin, layout, budget)
        if last > first:  # otherwise no query of the chunk has a past block
            own = layout.token_block[begin:end]
            doc_first, own = ((block - first).to(q.device) for block in (layout.doc_first[own], own))
            in_range = _rank(q[begin:end], means[first:last], doc_first, own, num_past)
            chosen[begin:end] = torch.where(in_range >= 0, in_range + first, in_range)
        begin = end
    return chosen


def choose_past(q: Tensor, means: Tensor, num_past: int) -> Tensor:
    """The choice of one query that may take any of the n blocks: `[Hq, num_past]` from q `[Hq, D]`, means `[n, Hkv, D]`."""
    first, last = (torch.tensor([block], device=q.device) for block in (0, len(means)))
    return _rank(q[None], means, first, last, num_past)[0]


def _next_chunk(begin: int, layout: BlockLayout, budget: int) -> tuple[int, int, int]:
    """The end of the longest chunk of queries from `begin`, by halving, whose scores fit, and the blocks it can choose.

    A chunk's candidates are one contiguous range: from its first query's document to its last query's own block.
    """
    size = max(1, min(len(layout.token_block) - begin, budget))
    first = int(layout.doc_first[layout.token_block[begin]])
    while True:
        last = int(layout.token_block[begin + size - 1])
        if size == 1 or size * (last - first) <= budget:
            return begin + size, first, last
        size //= 2


def _rank(q: Tensor, means: Tensor, first: Tensor, last: Tensor, num_past: int) -> Tensor:
    """Best blocks of [first, last) per query, best first, then -1: `[c, Hq, num_past]`.

    q `[c, Hq, D]`, means `[n, Hkv, D]`, first and last `[c]`.
    """
    num_queries, num_heads, head_dim = q.shape
    num_means, num_kv, _ = means.shape
    by_kv_head = q.detach().to(means.dtype).view(num_queries, num_kv, -1, head_dim).transpose(0, 1)
    scores = torch.bmm(by_kv_head.reshape(num_kv, -1, head_dim), means.permute(1, 2, 0))
    scores = scores.view(num_kv, num_queries, -1, num_means)
    block = torch.arange(num_means, device=q.device)
    is_candidate = (block >= first[:, None]) & (block < last[:, None])  # [c, n]
    scores.masked_fill_(~is_candidate[None, :, None], float("-inf"))

    ranked = torch.full((num_kv, num_queries, num_heads // num_kv, num_past), -1, device=q.device)
    for slot in range(min(num_past, num_means)):
        best = scores.argmax(dim=-1, keepdim=True)  # of tied blocks argmax gives the first, hence the lowest
        ranked[..., slot : slot + 1] = torch.where((last - first > slot)[:, None, None], best, -1)
        scores.scatter_(-1, best, float("-inf"))
    return ranked.transpose(0, 1).reshape(num_queries, num_heads, num_past)
