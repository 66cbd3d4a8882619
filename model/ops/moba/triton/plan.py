"""What is known before any kernel runs: where blocks lie, which heads go together, and the tile sizes.

Shape letters, in all files of this folder: T tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dimension,
B block size, N blocks of all documents, P = topk - 1 past blocks a query chooses (its slots).
"""

import bisect
import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, TypeVarTuple

import torch
import triton.language as tl
from torch import Tensor

from model.ops.graphs import lasting
from model.ops.moba.routing import block_layout
from model.ops.moba.triton.schedule import Schedule, schedule

_Where = TypeVarTuple("_Where")
_Prepared = TypeVar("_Prepared")


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


@functools.lru_cache(maxsize=32)  # forward and backward pass ask for the same
def block_table(bounds: tuple[int, ...], block_size: int, max_slots: int, device: torch.device) -> Blocks:
    """The table of documents with boundaries `bounds`, with pair counts for 0..max_slots past blocks."""
    layout = block_layout(list(bounds), block_size)
    past = torch.arange(layout.num_blocks) - layout.doc_first
    pairs = tuple(int((past.clamp(max=n) * layout.length).sum()) for n in range(max_slots + 1))
    start, length, doc_first = (table.to(device, torch.int32) for table in (layout.start, layout.length, layout.doc_first))
    return Blocks(start=start, length=length, doc_first=doc_first, starts=tuple(layout.start.tolist()), size=block_size,
                  max_past=int(past.max()), num_pairs=pairs)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What is known of a call before its values are, and what was prepared from that, for all calls alike."""

    num_tokens: int
    """T."""
    num_heads: int
    """Hq."""
    group: int
    """G."""
    head_dim: int
    """D."""
    strides: tuple[int, int]
    """From token to token and from head to head of q."""
    kv_strides: tuple[int, int]
    """The same of k, and of v."""
    grad_strides: tuple[int, int]
    """The same of the output's gradient. Output and gradients lie as `[T, H, D]` without gaps."""
    blocks: Blocks
    cut: Schedule
    num_past: int
    """P."""
    softmax_scale: float
    on_hopper: bool
    """Whether warp groups multiply (wgmma, compute capability 9.0)."""
    prepared: dict[Hashable, Any] = field(default_factory=dict)
    """What functions returned that run `once_a_call`."""

    @functools.cached_property
    def groups(self) -> tuple[range, ...]:
        """The query heads of each group."""
        return tuple(range(first, first + self.cut.heads) for first in range(0, self.num_heads, self.cut.heads))

    @functools.cached_property
    def ranges(self) -> tuple[range, ...]:
        """The queries of each range."""
        firsts = range(0, self.num_tokens, self.cut.tokens)
        return tuple(range(first, min(first + self.cut.tokens, self.num_tokens)) for first in firsts)

    @property
    def num_kv(self) -> int:
        """Hkv."""
        return self.num_heads // self.group

    @property
    def num_lists(self) -> int:
        """Lists of a group of heads."""
        return self.cut.heads * self.blocks.count

    @property
    def scale(self) -> float:
        """Of the scores in base 2."""
        return self.softmax_scale / math.log(2)

    @property
    def keeps_dq(self) -> bool:
        """Whether the pass over keys leaves dQ on its way: a block's keys are one tile, registers suffice, and queries are one range."""
        one_tile = self.blocks.size == 128 if self.on_hopper else self.blocks.size <= 128
        return one_tile and self.num_past > 0 and self.cut.num_ranges == 1

    @property
    def offsets(self) -> tl.dtype:
        """The integer type that reaches every element of every view: narrow where it can be, since offsets live in registers."""
        per_token = (self.strides[0], self.kv_strides[0], self.grad_strides[0], max(self.num_heads, self.num_past) * self.head_dim)
        return tl.int32 if self.num_tokens * max(per_token) < 1 << 31 else tl.int64

    def most_pairs(self, queries: range) -> int:
        """(query, past block) pairs of a group of heads and a range of queries, at most."""
        return self.cut.heads * min(self.blocks.num_pairs[self.num_past], len(queries) * self.num_past)


def call_of(
    q: Tensor, k: Tensor, bounds: tuple[int, ...], *, block_size: int, topk: int, softmax_scale: float, workspace: int,
    d_out: Tensor | None = None,
) -> Call:  # fmt: skip
    """Of q `[T, Hq, D]`, k `[T, Hkv, D]`, documents with boundaries `bounds`, and in the backward pass the output's gradient."""
    grad_strides = (0, 0, 1) if d_out is None else d_out.stride()
    views = (q.shape, q.stride(), k.shape, k.stride(), grad_strides, q.dtype, q.device)
    return lasting(_call_of(*views, bounds, block_size, topk, softmax_scale, workspace), q.device)


@functools.lru_cache(maxsize=32)  # the layers of a model, and its steps on rows of one document, ask for the same
def _call_of(
    q_shape: tuple[int, int, int], q_strides: tuple[int, int, int], kv_shape: tuple[int, int, int], kv_strides: tuple[int, int, int],
    grad_strides: tuple[int, int, int], dtype: torch.dtype, device: torch.device, bounds: tuple[int, ...],
    block_size: int, topk: int, softmax_scale: float, workspace: int,
) -> Call:  # fmt: skip
    num_tokens, num_heads, head_dim = q_shape
    sizes = {"num_docs": len(bounds) - 1, "block_size": block_size, "topk": topk, "workspace": workspace}
    cut = schedule(q_shape, kv_shape[1], dtype.itemsize, **sizes)
    blocks = block_table(bounds, block_size, cut.num_slots, device)
    return Call(num_tokens=num_tokens, num_heads=num_heads, group=num_heads // kv_shape[1], head_dim=head_dim, strides=q_strides[:2],
                kv_strides=kv_strides[:2], grad_strides=grad_strides[:2], blocks=blocks, cut=cut,
                num_past=min(cut.num_slots, blocks.max_past), softmax_scale=softmax_scale, on_hopper=is_hopper(device))  # fmt: skip


def once_a_call(prepare: Callable[[Call, *_Where], _Prepared]) -> Callable[[Call, *_Where], _Prepared]:
    """Makes `prepare(call, *where)` run once for each call and place; after that its result is found in `call.prepared`."""

    def find(call: Call, *where: *_Where) -> _Prepared:
        key = (prepare, *where)
        found = call.prepared.get(key)
        if found is None:
            found = call.prepared[key] = prepare(call, *where)
        return found

    return find


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether warp groups multiply (wgmma, compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a kernel holds on chip: query rows, key (or mean) columns; loads in flight; warps."""

    rows: int
    columns: int
    stages: int
    warps: int


# By kernel, for blocks of at least so many tokens: measured on one H200 at D = 128, see README.md.
_TILES = {
    "gate": {
        64: Tile(rows=64, columns=64, stages=2, warps=4),  # 8 leave choices of 16 slots unwritten (Triton 3.6, H200)
        128: Tile(rows=128, columns=64, stages=2, warps=8),
        256: Tile(rows=128, columns=64, stages=2, warps=4),
    },
    "hopper_gate": {
        64: Tile(rows=64, columns=64, stages=2, warps=4),
        128: Tile(rows=128, columns=64, stages=2, warps=8),
    },
    "past": {
        64: Tile(rows=64, columns=64, stages=3, warps=4),
        2048: Tile(rows=128, columns=128, stages=3, warps=8),
    },
    "hopper_past": {
        64: Tile(rows=64, columns=64, stages=3, warps=4),
        192: Tile(rows=128, columns=128, stages=2, warps=4),
    },
    "hopper_dk_dv": {64: Tile(rows=64, columns=128, stages=3, warps=8)},  # with 64 columns fewer: hopper.DK_DV_WARPS
    "hopper_dq": {64: Tile(rows=128, columns=64, stages=3, warps=4)},
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
    return found if kernel.endswith("gate") else replace(found, columns=math.gcd(found.columns, block_size))
