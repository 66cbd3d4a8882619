"""Forward of the `torch` backend: partial softmax per tile, then a merge over each row's slots by log-sum-exp.

Shape letters as in tiles.py; C tiles of one chunk.
"""

import torch
from torch import Tensor

from model.ops.moba.routing import BlockLayout, to_blocks
from model.ops.moba.tiles import Tiles


def moba_forward(q: Tensor, k: Tensor, v: Tensor, *, layout: BlockLayout, tiles: Tiles, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the tiles: q `[T, Hq, D]`, k and v `[T, Hkv, D]`.

    Returns the output `[T, Hq, D]` and the log-sum-exp of each row's scores `[T * Hq]`, in fp32 (fp64 for fp64 inputs).
    """
    q_rows = pad_rows(q, softmax_scale)
    k_blocks, v_blocks = kv_blocks(k, layout), kv_blocks(v, layout)
    num_positions = tiles.rows.numel()
    # One position more than the tiles have: weightless, read by the slots that a row does not use.
    partial = q_rows.new_empty(num_positions + 1, q.shape[-1])
    partial_lse = q_rows.new_empty(num_positions + 1)
    partial[-1], partial_lse[-1] = 0, float("-inf")

    out_tiles, lse_tiles = partial[:-1].view(*tiles.rows.shape, -1), partial_lse[:-1].view(tiles.rows.shape)
    for chunk, is_own in tiles.chunks():
        scores = tile_scores(q_rows, k_blocks, chunk, is_own, tiles=tiles, layout=layout, num_heads=q.shape[1])
        highest = scores.amax(dim=-1)
        probs = scores.softmax(dim=-1)
        # The largest probability is exp(0) / sum, so it gives the sum without a second exponential.
        torch.sub(highest, probs.amax(dim=-1).log_(), out=lse_tiles[chunk])
        torch.bmm(probs, v_blocks[tiles.block[chunk]], out=out_tiles[chunk])

    slot_lse = partial_lse[tiles.position]  # [S, T * Hq]
    lse = slot_lse.logsumexp(dim=0)
    out = q_rows.new_zeros(q.shape)
    for position, weight in zip(tiles.position, slot_lse.sub_(lse).exp_()):
        out.view(-1, q.shape[-1]).addcmul_(partial.index_select(0, position), weight[:, None])
    return out, lse


def tile_scores(
    q_rows: Tensor, k_blocks: Tensor, chunk: slice, is_own: bool, *, tiles: Tiles, layout: BlockLayout, num_heads: int
) -> Tensor:
    """Scaled scores `[C, R, B]` of a chunk; -inf at keys after the query, which only an own block holds."""
    rows, block = tiles.rows[chunk], tiles.block[chunk]
    scores = torch.bmm(gather_rows(q_rows, rows), k_blocks[block].transpose(1, 2))
    if is_own:
        offset = rows // num_heads - layout.start.to(rows.device)[block % layout.num_blocks][:, None]  # [C, R]
        scores.masked_fill_(torch.arange(layout.block_size, device=rows.device) > offset[..., None], float("-inf"))
    return scores


def pad_rows(x: Tensor, scale: float = 1.0) -> Tensor:
    """x `[T, Hq, D]` times `scale` as rows `[T * Hq + 1, D]` in the compute dtype; the last, for padding, is zero."""
    rows = x.new_zeros(x.shape[0] * x.shape[1] + 1, x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))
    rows[:-1].view(x.shape).copy_(x)
    return rows if scale == 1.0 else rows.mul_(scale)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x `[n, ...]` at `rows` `[C, R]`, as `[C, R, ...]`."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])


def kv_blocks(x: Tensor, layout: BlockLayout) -> Tensor:
    """Keys or values `[T, Hkv, D]` as blocks `[Hkv * N, B, D]` in the compute dtype, padded with zeros."""
    blocks = to_blocks(x.to(torch.promote_types(x.dtype, torch.float32)), layout)  # [N, B, Hkv, D]
    return blocks.permute(2, 0, 1, 3).flatten(0, 1).contiguous()
