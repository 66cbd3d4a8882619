"""The `torch` backend: sliding-window attention in chunks of queries, memory linear in T, forward and backward.

A chunk is C queries of one document, counted from its first token, and the keys that they see, at most C + window - 1 of
them: neither depends on later tokens or on other documents. The backward pass computes the probabilities again from the
log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm 2); autograd over slices would write a gradient of all T keys
for each chunk. The forward pass is one operator of torch's dispatcher, so that activation checkpointing can keep what it gives.
Shape letters: T tokens, Hq and Hkv heads, G = Hq // Hkv, C queries and S keys of a chunk.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores [Hkv, G * C, S] of a chunk, in elements; the CPU's share keeps them in its second-level cache.
_CHUNK_BUDGET = {"cpu": 1 << 19, "default": 1 << 25}
_MIN_CHUNK, _MAX_CHUNK = 16, 1024


def sliding_chunked(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], window: int, softmax_scale: float) -> Tensor:
    """As `sliding_reference`: q `[T, Hq, D]`, k and v `[T, Hkv, D]`; returns `[T, Hq, D]` in q's dtype.

    Accumulates in fp32 (fp64 for fp64 inputs), deterministically.
    """
    return _forward(q, k, v, bounds, window, softmax_scale)[0]


@torch.library.custom_op("sliding::chunked_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], window: int, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, D]` and its log-sum-exp `[Hkv, T, G]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(k.shape[1], q.shape[0], q.shape[1] // k.shape[1], dtype=_compute(q))
    for queries, keys in _chunks(bounds, window, q):
        scores = _scores(q, k, queries, keys, window, softmax_scale)
        chunk_lse = scores.logsumexp(dim=-1, keepdim=True)
        chunk_out = torch.bmm(scores.sub_(chunk_lse).exp_(), _keys(v, keys))
        out[queries] = _from_heads(chunk_out, len(out[queries]))
        lse[:, queries] = chunk_lse.view(lse[:, queries].shape)
    return out, lse


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.bounds, ctx.window, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp, which has no gradient


@once_differentiable
def _differentiate(ctx, d_out: Tensor | None, _: None):
    if d_out is None:
        return (None,) * 6
    q, k, v, out, lse = ctx.saved_tensors
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.zeros(x.shape, dtype=_compute(x), device=x.device) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys in _chunks(ctx.bounds, ctx.window, q):
            scores = _scores(q, k, queries, keys, ctx.window, ctx.softmax_scale)
            probs = scores.sub_(lse[:, queries].flatten(1)[..., None]).exp_()
            d_chunk = _queries(d_out[queries], k.shape[1])
            delta = (d_chunk * _queries(out[queries], k.shape[1])).sum(dim=-1, keepdim=True)  # D = rowsum(dO * O)
            d_v[keys] += torch.bmm(probs.transpose(1, 2), d_chunk).transpose(0, 1)
            d_scores = torch.bmm(d_chunk, _keys(v, keys).transpose(1, 2)).sub_(delta).mul_(probs).mul_(ctx.softmax_scale)
            d_q[queries] = _from_heads(torch.bmm(d_scores, _keys(k, keys)), len(d_q[queries]))
            d_k[keys] += torch.bmm(d_scores.transpose(1, 2), _queries(q[queries], k.shape[1])).transpose(0, 1)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _chunks(bounds: Sequence[int], window: int, q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Tokens of the queries of each chunk, and of the keys that they see."""
    budget = _CHUNK_BUDGET.get(q.device.type, _CHUNK_BUDGET["default"]) // q.shape[1]
    size = _MAX_CHUNK
    while size > _MIN_CHUNK and size * (size + window) > budget:
        size //= 2
    for start, end in itertools.pairwise(bounds):
        for first in range(start, end, size):
            last = min(first + size, end)
            yield slice(first, last), slice(max(first - window + 1, start), last)


def _scores(q: Tensor, k: Tensor, queries: slice, keys: slice, window: int, softmax_scale: float) -> Tensor:
    """Scaled scores of a chunk `[Hkv, C * G, S]`; -inf at keys after the query and at keys that have left its window."""
    scores = torch.bmm(_queries(q[queries], k.shape[1]), _keys(k, keys).transpose(1, 2)).mul_(softmax_scale)
    query, key = (torch.arange(part.start, part.stop, device=q.device) for part in (queries, keys))
    distance = query[:, None] - key
    hidden = (distance < 0) | (distance >= window)
    scores.view(k.shape[1], len(query), -1, len(key)).masked_fill_(hidden[:, None], float("-inf"))
    return scores


def _compute(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _queries(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[C, Hq, D]` to `[Hkv, C * G, D]` in the compute dtype."""
    return x.to(_compute(x)).unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _from_heads(x: Tensor, num_queries: int) -> Tensor:
    """The inverse of `_queries`, still in the compute dtype."""
    return x.unflatten(1, (num_queries, -1)).transpose(0, 1).flatten(1, 2)


def _keys(x: Tensor, keys: slice) -> Tensor:
    """Keys or values `[T, Hkv, D]` of a chunk as `[Hkv, S, D]` in the compute dtype."""
    return x[keys].to(_compute(x)).transpose(0, 1)
