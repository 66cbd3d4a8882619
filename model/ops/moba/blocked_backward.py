"""Backward of the `torch` backend: probabilities recomputed per tile from the final log-sum-exp (FlashAttention-2,
arXiv 2307.08691, algorithm 2). dK and dV add up per block in token order, dQ through each row's slots: no atomics on
the CPU, the same bits in every run. Shape letters as in tiles.py.
"""

import torch
from torch import Tensor

from model.ops.moba.blocked_forward import gather_rows, kv_blocks, pad_rows, tile_scores
from model.ops.moba.routing import BlockLayout
from model.ops.moba.tiles import Tiles


def moba_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    layout: BlockLayout,
    tiles: Tiles,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q `[T, Hq, D]`, k and v `[T, Hkv, D]` from that of the output, in fp32 (fp64 for fp64 inputs)."""
    num_heads, head_dim = q.shape[1:]
    q_rows, d_out_rows = pad_rows(q, softmax_scale), pad_rows(d_out)
    k_blocks, v_blocks = kv_blocks(k, layout), kv_blocks(v, layout)
    # Padding rows: an infinite log-sum-exp makes every probability an exact zero.
    lse_rows = torch.cat([lse, lse.new_full((1,), float("inf"))])
    delta_rows = (d_out_rows * pad_rows(out)).sum(dim=-1)  # D = rowsum(dO * O)

    d_k_blocks, d_v_blocks = torch.zeros_like(k_blocks), torch.zeros_like(v_blocks)
    d_q_positions = q_rows.new_empty(tiles.rows.numel() + 1, head_dim)
    d_q_positions[-1] = 0  # read by unused slots
    d_q_tiles = d_q_positions[:-1].view(*tiles.rows.shape, head_dim)
    for chunk, is_own in tiles.chunks():
        rows, block = tiles.rows[chunk], tiles.block[chunk]
        scores = tile_scores(q_rows, k_blocks, chunk, is_own, tiles=tiles, layout=layout, num_heads=num_heads)
        probs = scores.sub_(lse_rows[rows][..., None]).exp_()
        d_out_tiles = gather_rows(d_out_rows, rows)
        d_v_blocks.index_add_(0, block, torch.bmm(probs.transpose(1, 2), d_out_tiles))
        d_scores = torch.bmm(d_out_tiles, v_blocks[block].transpose(1, 2))
        d_scores.sub_(delta_rows[rows][..., None]).mul_(probs)
        torch.bmm(d_scores, k_blocks[block], out=d_q_tiles[chunk])
        d_k_blocks.index_add_(0, block, torch.bmm(d_scores.transpose(1, 2), gather_rows(q_rows, rows)))

    d_q = q_rows.new_zeros(q.shape)
    for position in tiles.position:
        d_q.view(-1, head_dim).add_(d_q_positions.index_select(0, position))
    return d_q.mul_(softmax_scale), from_blocks(d_k_blocks, layout), from_blocks(d_v_blocks, layout)


def from_blocks(blocks: Tensor, layout: BlockLayout) -> Tensor:
    """Blocks `[Hkv * N, B, D]` back to tokens `[T, Hkv, D]`; the inverse of `kv_blocks`."""
    token = torch.arange(len(layout.token_block))
    place = layout.token_block * layout.block_size + token - layout.start[layout.token_block]
    per_head = blocks.view(-1, layout.num_blocks * layout.block_size, blocks.shape[-1])
    return per_head.index_select(1, place.to(blocks.device)).transpose(0, 1)
