"""Work list of the `torch` backend: every (query, block) pair seen, gathered by block and cut into equal tiles.

A *row* is a (token, query head), numbered token * Hq + head; an *entry* is a row and one block it sees. The entries of
one (key/value head, block) form a list in token order; lists are cut into tiles of `TILE_ROWS` rows, the last one padded.
A row's place in its list depends on earlier tokens only, and all tiles have one shape: that is why a later token, or
another document, cannot change the rounding of a row's result.

Shape letters: T tokens, Hq query heads, Hkv key/value heads, N blocks, B block size, S = topk, M tiles, R = TILE_ROWS.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.ops.moba.routing import BlockLayout

TILE_ROWS = 64

# Scores [C, R, B] held at once, in elements; the CPU's share keeps a chunk of tiles in its second-level cache.
_CHUNK_BUDGET = {"cpu": 1 << 17, "default": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles over own blocks come first, then tiles over past blocks; all tensors int64 on the device of the inputs."""

    rows: Tensor
    """Row of each tile position `[M, R]`; T * Hq marks padding."""
    block: Tensor
    """Block of each tile `[M]`, as an index into [Hkv * N] key/value blocks."""
    position: Tensor
    """Where the result of each row's slot lies among the M * R tile positions `[S, T * Hq]`; M * R marks an unused slot."""
    num_own: int
    """How many of the tiles are over own blocks, where the causal mask cuts."""
    chunk: int
    """Tiles to process at once."""

    def chunks(self) -> Iterator[tuple[slice, bool]]:
        """Slices of tiles to process together, each with whether the causal mask is needed."""
        for first, last, is_own in ((0, self.num_own, True), (self.num_own, len(self.block), False)):
            for begin in range(first, last, self.chunk):
                yield slice(begin, min(begin + self.chunk, last)), is_own


def build_tiles(chosen: Tensor, layout: BlockLayout, *, num_kv_heads: int) -> Tiles:
    """Tiles for the past blocks `chosen` `[T, Hq, topk-1]` (global ids, -1: none) and every token's own block."""
    device = chosen.device
    num_tokens, num_heads, num_past = chosen.shape
    num_rows, num_slots, num_lists = num_tokens * num_heads, num_past + 1, num_kv_heads * layout.num_blocks
    list_of = _entry_lists(chosen, layout, num_kv_heads)

    # Sorted stably, the entries of a list stay in token order; unused slots (list 2 * num_lists) come last.
    entry = torch.sort(list_of, stable=True)
    counts = torch.bincount(entry.values, minlength=2 * num_lists + 1)[:-1]
    tiles_of_list = (counts + TILE_ROWS - 1) // TILE_ROWS
    list_of_tile = torch.arange(2 * num_lists, device=device).repeat_interleave(tiles_of_list)
    num_tiles = len(list_of_tile)

    # An entry moves from its place among the entries to the same rank within its list's tiles.
    shift = (tiles_of_list.cumsum(0) - tiles_of_list) * TILE_ROWS - (counts.cumsum(0) - counts)
    used = entry.indices[: int(counts.sum())]
    place = torch.arange(len(used), device=device) + shift[entry.values[: len(used)]]
    rows = torch.full((num_tiles * TILE_ROWS,), num_rows, device=device)
    rows[place] = used // num_slots
    position = torch.full((num_rows * num_slots,), num_tiles * TILE_ROWS, device=device)
    position[used] = place

    budget = _CHUNK_BUDGET.get(device.type, _CHUNK_BUDGET["default"])
    return Tiles(
        rows=rows.view(num_tiles, TILE_ROWS),
        block=list_of_tile % num_lists,
        position=position.view(num_rows, num_slots).t().contiguous(),
        num_own=int(tiles_of_list[:num_lists].sum()),
        chunk=max(1, budget // (TILE_ROWS * layout.block_size)),
    )


def _entry_lists(chosen: Tensor, layout: BlockLayout, num_kv_heads: int) -> Tensor:
    """The list that each (row, slot) belongs to, flattened `[T * Hq * S]`; slot 0 is the own block."""
    _num_tokens, num_heads, _ = chosen.shape
    num_blocks = layout.num_blocks
    num_lists = num_kv_heads * num_blocks
    own = layout.token_block.to(chosen.device)[:, None, None].expand(-1, num_heads, 1)
    kv_head = torch.arange(num_heads, device=chosen.device)[:, None] // (num_heads // num_kv_heads)
    first_list = kv_head * num_blocks
    past = torch.where(chosen >= 0, chosen + first_list + num_lists, 2 * num_lists)
    return torch.cat([own + first_list, past], dim=-1).int().flatten()  # 32-bit keys sort faster
