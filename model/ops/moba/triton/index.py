"""Who chose each block: a stable counting sort of (query, slot) by (head, block), the same in every run.

A chunk of queries is sorted on chip and counted; the running sum of all counts, by head, block and chunk, says where each chunk's part of
each list goes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.moba.triton.launch import launch
from model.ops.moba.triton.plan import Blocks, Schedule, power_of_2

_NONE = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The queries that chose each block, of a group of H heads; int32."""

    entries: Tensor
    """query * P + slot, list after list, by query in each `[pairs]`."""
    edges: Tensor
    """`[num_ranges + 1, H * N]`: the list of (head, block) has its entries of query range r from edges[r] to edges[r + 1]."""
    num_entries: int
    """Pairs, at most."""

    def of_range(self, r: int, most: int) -> "Lists":
        """The part with queries of one range, at most so many pairs."""
        return Lists(entries=self.entries, edges=self.edges[r : r + 2], num_entries=min(self.num_entries, most))


@triton.jit
def _join_runs(block_a, count_a, block_b, count_b):
    return block_b, tl.where(block_a == block_b, count_a + count_b, count_b)


@triton.jit
def _count_kernel(
    CHOSEN, KEYS, COUNTS, num_tokens, num_blocks, num_chunks,
    P: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = tl.arange(0, CHUNK * SLOTS)
    query, slot = chunk * CHUNK + entry // SLOTS, entry % SLOTS
    real = (slot < P) & (query < num_tokens)
    block = tl.load(CHOSEN + (head * num_tokens + query) * P + slot, mask=real, other=-1)
    key = tl.sort(tl.where(block >= 0, (block << BITS) | entry, _NONE))
    tl.store(KEYS + (head * num_chunks + chunk) * (CHUNK * SLOTS) + entry, key)
    tl.atomic_add(COUNTS + (head * num_blocks + (key >> BITS)) * num_chunks + chunk, 1, mask=key != _NONE, sem="relaxed")


@triton.jit
def _scatter_kernel(
    KEYS, COUNTS, ENDS, ENTRIES, EDGES, num_blocks, num_chunks, range_chunks,
    P: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, CHUNK * SLOTS)
    key = tl.load(KEYS + (head * num_chunks + chunk) * (CHUNK * SLOTS) + place)
    real = key != _NONE
    block = key >> BITS
    _, nth = tl.associative_scan((block, tl.full((CHUNK * SLOTS,), 1, tl.int32)), 0, _join_runs)
    at = (head * num_blocks + block) * num_chunks + chunk
    first = tl.load(ENDS + at, mask=real, other=0) - tl.load(COUNTS + at, mask=real, other=0)
    entry = key & ((1 << BITS) - 1)
    tl.store(ENTRIES + first + nth - 1, (chunk * CHUNK + entry // SLOTS) * P + entry % SLOTS, mask=real)
    last = chunk == num_chunks - 1
    if (chunk == 0) | last | (chunk % range_chunks == range_chunks - 1):  # an edge of a range
        num_lists = tl.num_programs(1) * num_blocks
        edge = EDGES + (chunk // range_chunks + 1).to(tl.int64) * num_lists + head * num_blocks
        for first_block in range(0, num_blocks, STEP):
            step = first_block + tl.arange(0, STEP)
            inside = step < num_blocks
            counted = (head * num_blocks + step) * num_chunks + chunk
            end = tl.load(ENDS + counted, mask=inside, other=0)
            if chunk == 0:
                tl.store(EDGES + head * num_blocks + step, end - tl.load(COUNTS + counted, mask=inside, other=0), mask=inside)
            if last | (chunk % range_chunks == range_chunks - 1):
                tl.store(edge + step, end, mask=inside)


def build_lists(chosen: Tensor, blocks: Blocks, cut: Schedule, entries: Tensor, edges: Tensor) -> Lists:
    """Sorts `chosen`, int32 `[H, T, P]` of global block ids or -1, by (head, block), into `entries` and the head of `edges`."""
    num_heads, num_tokens, num_past = chosen.shape
    slots = power_of_2(num_past)
    num_chunks = triton.cdiv(num_tokens, cut.chunk)
    num_lists = num_heads * blocks.count
    bits = (cut.chunk * slots - 1).bit_length()
    keys = torch.empty(num_heads, num_chunks, cut.chunk * slots, device=chosen.device, dtype=torch.int32)
    counts = torch.zeros(num_lists, num_chunks, device=chosen.device, dtype=torch.int32)
    edges = edges[: (cut.num_ranges + 1) * num_lists].view(cut.num_ranges + 1, num_lists)
    grid, sizes = (num_chunks, num_heads), {"P": num_past, "SLOTS": slots, "CHUNK": cut.chunk, "BITS": bits}
    launch(_count_kernel, grid, chosen, keys, counts, num_tokens, blocks.count, num_chunks, **sizes, warps=4)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    numbers = (blocks.count, num_chunks, cut.tokens // cut.chunk)
    launch(_scatter_kernel, grid, keys, counts, ends, entries, edges, *numbers, **sizes, STEP=256, warps=4)
    return Lists(entries=entries, edges=edges, num_entries=num_heads * blocks.num_pairs[num_past])


@dataclass(frozen=True, kw_only=True)
class Items:
    """Lists cut into pieces of one size, one program each: how many pieces end with each list, and a bound known to the host."""

    ends: Tensor
    """Pieces of all lists up to and with this one, int32 `[H * N]`."""
    piece: Tensor
    """List of each piece, int32 `[bound]`; what is past the last piece is not set."""
    bound: int
    """Programs to launch."""


@triton.jit
def _ends_kernel(BEGIN, END, ENDS, num_lists, SIZE: tl.constexpr, SKIP: tl.constexpr, STEP: tl.constexpr):
    so_far = tl.zeros((), tl.int32)
    for first in range(0, num_lists, STEP):
        which = first + tl.arange(0, STEP)
        inside = which < num_lists
        count = tl.load(END + which, mask=inside, other=0) - tl.load(BEGIN + which, mask=inside, other=0)
        pieces = tl.maximum((count + SIZE - 1) // SIZE - SKIP, 0)
        tl.store(ENDS + which, so_far + tl.cumsum(pieces, 0), mask=inside)
        so_far += tl.sum(pieces, 0)


@triton.jit
def _pieces_kernel(BEGIN, END, ENDS, PIECE, SIZE: tl.constexpr, SKIP: tl.constexpr, STEP: tl.constexpr):
    which = tl.program_id(0)
    pieces = tl.maximum((tl.load(END + which) - tl.load(BEGIN + which) + SIZE - 1) // SIZE - SKIP, 0)
    first = tl.load(ENDS + which) - pieces
    step = tl.arange(0, STEP)
    for i in range(0, pieces, STEP):
        tl.store(PIECE + first + i + step, tl.full((STEP,), 0, tl.int32) + which, mask=i + step < pieces)


def cut_lists(lists: Lists, size: int, *, skip: int = 0) -> Items:
    """Pieces of `size` entries, without the first `skip` of each list; a list's last may be short."""
    begin, end = lists.edges[0], lists.edges[-1]
    num_lists = len(begin)
    bound = lists.num_entries // size + (0 if skip else num_lists)
    ends = torch.empty(num_lists, device=begin.device, dtype=torch.int32)
    piece = torch.empty(bound, device=begin.device, dtype=torch.int32)
    launch(_ends_kernel, (1, 1), begin, end, ends, num_lists, SIZE=size, SKIP=skip, STEP=1024, warps=4)
    launch(_pieces_kernel, (num_lists, 1), begin, end, ends, piece, SIZE=size, SKIP=skip, STEP=64, warps=1)
    return Items(ends=ends, piece=piece, bound=bound)
