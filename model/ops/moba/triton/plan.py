"""What is known before any kernel runs: where blocks lie, which heads go together, and the tile sizes.

Shape letters, in all files of this folder: T tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dimension,
B block size, N blocks of all documents, P = topk - 1 past blocks a query chooses (its slots).
"""

import bisect
import functools
import math
from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from model.ops.moba.routing import block_layout

# A list of queries longer than this many times the mean is split over programs: trained models have blocks that most queries choose.
SPLIT = 4


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The block table on the device, int32, and what the host needs of it."""

    start: Tensor
    """First token of each block `[N]`."""
    length: Tensor
    """Tokens in each block `[N]`; only a document's last may be short, and it is no query's past block."""
    doc_first: Tensor
    """First block of each block's document `[N]`."""
    starts: tuple[int, ...]
    """`start` on the host."""
    size: int
    """B."""
    max_past: int
    """Past blocks of the query that has the most."""
    num_pairs: tuple[int, ...]
    """Entry n: (query, block) pairs of one head where a query chooses at most n past blocks."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.starts)

    def of(self, token: int) -> int:
        """The token's own block."""
        return bisect.bisect_right(self.starts, token) - 1


@functools.lru_cache(maxsize=32)  # the layers of a model, and its steps on rows of one document, ask for the same
def block_table(bounds: tuple[int, ...], block_size: int, max_slots: int, device: torch.device) -> Blocks:
    """The table of documents with boundaries `bounds`, with pair counts for 0..max_slots past blocks."""
    layout = block_layout(list(bounds), block_size)
    past = torch.arange(layout.num_blocks) - layout.doc_first
    pairs = tuple(int((past.clamp(max=n) * layout.length).sum()) for n in range(max_slots + 1))
    start, length, doc_first = (table.to(device, torch.int32) for table in (layout.start, layout.length, layout.doc_first))
    return Blocks(start=start, length=length, doc_first=doc_first, starts=tuple(layout.start.tolist()), size=block_size,
                  max_past=int(past.max()), num_pairs=pairs)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a call is cut so that what it holds at once fits in the workspace: heads in groups, and queries in ranges where need be."""

    num_slots: int
    """P, at most: documents may have fewer past blocks."""
    max_blocks: int
    """N, at most."""
    heads: int
    """Query heads of a group."""
    num_groups: int
    chunk: int
    """Queries whose choices are sorted on chip."""
    tokens: int
    """Queries of a range, a multiple of `chunk`."""
    num_ranges: int


def schedule(
    q_shape: tuple[int, ...], num_kv: int, itemsize: int, *, num_docs: int, block_size: int, topk: int, workspace: int
) -> Schedule:
    """The cut for q `[T, Hq, D]`; it depends on sizes alone, so that the shapes of what is saved are known before any value is.

    A slot holds a partial output, later a partial gradient, of one query for one past block. `workspace` counts bytes.
    """
    num_tokens, num_heads, head_dim = q_shape
    group = num_heads // num_kv
    max_blocks = num_tokens // block_size + num_docs
    num_slots = min(topk, max_blocks) - 1
    slots = power_of_2(max(1, num_slots))
    sorted_together = 1024 if num_tokens < 1 << 18 else 4096  # the counts grow as blocks x chunks
    chunk = max(16, sorted_together // slots)
    per_token = num_slots * head_dim * itemsize + max(4 * num_slots, 8 * head_dim // SPLIT)
    fit = max(1, workspace // (num_tokens * per_token) // group)
    groups = next(n for n in range(1, num_kv + 1) if num_kv % n == 0 and num_kv // n <= fit)
    heads = num_heads // groups
    in_range = num_tokens
    if num_tokens * per_token * heads > workspace:
        in_range = max(1, workspace // (per_token * heads) // chunk) * chunk
    ranges = -(-num_tokens // in_range)
    return Schedule(num_slots=num_slots, max_blocks=max_blocks, heads=heads, num_groups=groups, chunk=chunk,
                    tokens=-(-in_range // chunk) * chunk, num_ranges=ranges)  # fmt: skip


def offsets(*sizes: int) -> tl.dtype:
    """The integer type that reaches every element of the views of these sizes: narrow where it can be, since offsets live in registers."""
    return tl.int32 if max(sizes) < 1 << 31 else tl.int64


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
    "dq_own": {64: Tile(rows=64, columns=32, stages=3, warps=4)},
}


@functools.cache
def tile_of(kernel: str, block_size: int) -> Tile:
    """The tile for blocks of this size; its columns divide the block."""
    found = next(tile for least, tile in reversed(_TILES[kernel].items()) if block_size >= least)
    return replace(found, columns=math.gcd(found.columns, block_size)) if kernel != "gate" else found
