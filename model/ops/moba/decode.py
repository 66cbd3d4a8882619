"""MoBA for cached generation: one new token over the keys and values so far.

The cache keeps, beside keys and values, the mean key of each whole block. A query only ever chooses among blocks that
lie wholly before its own, so a mean is computed once, when its block is complete, and a step touches the means and the
tokens of at most topk blocks.
"""

import torch
from torch import Tensor

from model.ops.checks import check_decode, check_positive_int
from model.ops.full.sdpa import sdpa_heads
from model.ops.moba.routing import block_layout, block_means, choose_past


def update_block_means(means: Tensor | None, k: Tensor, *, block_size: int) -> Tensor:
    """Append the means of the blocks that have become whole.

    means `[n, Hkv, D]` from an earlier call on a prefix of the same document (None: start), k `[S, Hkv, D]` all keys so
    far. Returns `[S // block_size, Hkv, D]` in fp32 (fp64 for fp64 keys); reads only keys of blocks not yet in `means`.
    Call it after the prompt and after each appended key. Raises ValueError on a block_size below 1.
    """
    check_positive_int(block_size=block_size)
    num_known, num_whole = 0 if means is None else len(means), len(k) // block_size
    if means is not None and num_known == num_whole:
        return means
    if num_whole == 0:
        return k.new_empty(0, *k.shape[1:], dtype=torch.promote_types(k.dtype, torch.float32))
    fresh = k[num_known * block_size : num_whole * block_size]
    added = block_means(fresh, block_layout([0, len(fresh)], block_size))
    return added if means is None else torch.cat([means, added])


def moba_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    *,
    block_size: int,
    topk: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """MoBA of one new token over a cache: the last row of `moba_attention` on the document, up to rounding.

    Args:
        q: the newest token's queries `[Hq, D]`.
        k, v: all keys and values of its document so far, its own included, `[S, Hkv, D]`.
        means: `update_block_means` of k: at least the (S - 1) // block_size blocks before the token's own.
        block_size, topk, softmax_scale: as in `moba_attention`.

    Returns: `[Hq, D]` in q's dtype. One sequence; batching is the caller's.
    Raises: ValueError naming the argument, its value and what is accepted.
    """
    check_positive_int(block_size=block_size, topk=topk)
    check_decode(q, k, v, softmax_scale)
    num_tokens, num_kv, head_dim = k.shape
    own_block = (num_tokens - 1) // block_size
    if means.dim() != 3 or means.shape[1:] != k.shape[1:] or len(means) < own_block:
        raise ValueError(
            f"means has shape {tuple(means.shape)}; accepted: [n, {num_kv}, {head_dim}] with n >= {own_block} whole blocks "
            f"(update_block_means of the {num_tokens} keys)"
        )
    scale = softmax_scale or head_dim**-0.5
    with torch.autocast(q.device.type, enabled=False):  # the inputs' dtype decides, and the gate needs fp32
        if topk > own_block:  # every past block is chosen
            return sdpa_heads(q[None], k, v, is_causal=False, softmax_scale=scale)[0]
        chosen = choose_past(q, means[:own_block], topk - 1)  # [Hq, topk-1]
        past = chosen[..., None] * block_size + torch.arange(block_size, device=q.device)
        own = torch.arange(own_block * block_size, num_tokens, device=q.device).expand(len(q), -1)
        seen = torch.cat([past.flatten(1), own], dim=1)  # tokens seen by each query head [Hq, L]
        kv_head = (torch.arange(len(q), device=q.device) // (len(q) // num_kv))[:, None]
        k_seen, v_seen = (x[seen, kv_head].transpose(0, 1) for x in (k, v))
        return sdpa_heads(q[None], k_seen, v_seen, is_causal=False, softmax_scale=scale)[0]
