"""What is known before any kernel runs: where blocks lie, which heads go together, and the tile sizes.

Shape letters, in all files of this folder: T tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dimension,
B block size, N blocks of all documents, P = topk - 1 past blocks a query chooses (its slots).
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.ops.moba.routing import block_layout

# Bytes of partial results and lists held at once; groups of key/value heads go one after another where all would pass it.
WORKSPACE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The block table on the device, int32, and what the host needs of it."""

    start: Tensor
    """First token of each block `[N]`."""
    length: Tensor
    """Tokens in each block `[N]`; only a document's last may be short, and it is no query's past block."""
    doc_first: Tensor
    """First block of each block's document `[N]`."""
    token_block: Tensor
    """Own block of each token `[T]`."""
    size: int
    """B."""
    max_past: int
    """Past blocks of the query that has the most."""
    num_pairs: tuple[int, ...]
    """Entry n: (query, block) pairs of one head where a query chooses at most n past blocks."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.start)


@functools.lru_cache(maxsize=32)  # the layers of a model, and its steps on rows of one document, ask for the same
def block_table(bounds: tuple[int, ...], block_size: int, max_slots: int, device: torch.device) -> Blocks:
    """The table of documents with boundaries `bounds`, with pair counts for 0..max_slots past blocks."""
    layout = block_layout(list(bounds), block_size)
    past = torch.arange(layout.num_blocks) - layout.doc_first
    pairs = tuple(int((past.clamp(max=n) * layout.length).sum()) for n in range(max_slots + 1))
    tables = (table.to(device, torch.int32) for table in (layout.start, layout.length, layout.doc_first, layout.token_block))
    start, length, doc_first, token_block = tables
    return Blocks(start=start, length=length, doc_first=doc_first, token_block=token_block, size=block_size,
                  max_past=int(past.max()), num_pairs=pairs)  # fmt: skip


def heads_together(*, num_tokens: int, num_heads: int, group: int, num_slots: int, head_dim: int) -> int:
    """Query heads whose slots fit in the workspace: a divisor of `num_heads` and a multiple of `group`, at least one group."""
    per_head = num_tokens * max(1, num_slots) * (2 * head_dim + 12)
    fit = max(group, WORKSPACE // per_head // group * group)
    while num_heads % fit:
        fit -= group
    return min(fit, num_heads)


def power_of_2(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a kernel holds on chip: query rows, key (or mean) columns; loads in flight; warps."""

    rows: int
    columns: int
    stages: int
    warps: int


# By kernel, for blocks of at least so many tokens: measured on one H200 at D = 128, see README.md.
_TILES = {
    "gate": {64: Tile(rows=128, columns=64, stages=2, warps=4)},
    "past": {
        64: Tile(rows=64, columns=64, stages=3, warps=4),
        2048: Tile(rows=128, columns=128, stages=3, warps=8),
    },
    "own": {64: Tile(rows=64, columns=64, stages=3, warps=4)},
    "dk_dv": {
        64: Tile(rows=64, columns=128, stages=2, warps=8),
        256: Tile(rows=64, columns=64, stages=2, warps=4),
    },
    "dq_past": {64: Tile(rows=128, columns=64, stages=3, warps=8)},
    "dq_own": {64: Tile(rows=64, columns=64, stages=2, warps=4)},
}


def tile_of(kernel: str, block_size: int) -> Tile:
    """The tile for blocks of this size; its columns divide the block."""
    found = next(tile for least, tile in reversed(_TILES[kernel].items()) if block_size >= least)
    return replace(found, columns=math.gcd(found.columns, block_size)) if kernel != "gate" else found
