"""Who chose each block: a stable counting sort of (query, slot) by (head, block), the same in every run.

A chunk of queries is sorted on chip and counted; the running sum of all counts, by head, block and chunk, says where each chunk's part of
each list goes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.moba.triton.launch import TABLES, Launch
from model.ops.moba.triton.plan import Call, once_a_call
from model.ops.moba.triton.schedule import power_of_2

_NONE = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The queries that chose each block, of a group of H heads; int32."""

    entries: Tensor
    """query * P + slot, list after list, by query in each `[pairs]`."""
    edges: tuple[Tensor, ...]
    """One for each end of a query range, `[H * N]`: the list of (head, block) has its entries of range r from edges[r] to edges[r + 1]."""

    def of_range(self, r: int) -> "Lists":
        """The part with queries of one range."""
        return Lists(entries=self.entries, edges=self.edges[r : r + 2])


@triton.jit
def _join_runs(block_a, count_a, block_b, count_b):
    return block_b, tl.where(block_a == block_b, count_a + count_b, count_b)


@triton.jit(do_not_specialize_on_alignment=TABLES)
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


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _scatter_kernel(
    KEYS, ENDS, ENTRIES, EDGES, num_blocks, num_chunks, range_chunks, num_lists, first_entry,
    P: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, CHUNK * SLOTS)
    key = tl.load(KEYS + (head * num_chunks + chunk) * (CHUNK * SLOTS) + place)
    real = key != _NONE
    block = key >> BITS
    _, nth = tl.associative_scan((block, tl.full((CHUNK * SLOTS,), 1, tl.int32)), 0, _join_runs)
    at = (head * num_blocks + block) * num_chunks + chunk
    first = first_entry + tl.load(ENDS + at - 1, mask=real & (at > 0), other=0)
    entry = key & ((1 << BITS) - 1)
    tl.store(ENTRIES + first + nth - 1, (chunk * CHUNK + entry // SLOTS) * P + entry % SLOTS, mask=real)
    last = chunk == num_chunks - 1
    if (chunk == 0) | last | (chunk % range_chunks == range_chunks - 1):  # an edge of a range
        edge = EDGES + (chunk // range_chunks + 1).to(tl.int64) * num_lists + head * num_blocks
        for first_block in range(0, num_blocks, STEP):
            step = first_block + tl.arange(0, STEP)
            inside = step < num_blocks
            counted = (head * num_blocks + step) * num_chunks + chunk
            if chunk == 0:
                begin = tl.load(ENDS + counted - 1, mask=inside & (counted > 0), other=0)
                tl.store(EDGES + head * num_blocks + step, first_entry + begin, mask=inside)
            if last | (chunk % range_chunks == range_chunks - 1):
                tl.store(edge + step, first_entry + tl.load(ENDS + counted, mask=inside, other=0), mask=inside)


@once_a_call
def _sort_launches(call: Call, num_heads: int, heads_before: int) -> tuple[Launch, Launch]:
    cut, num_blocks, slots = call.cut, call.blocks.count, power_of_2(call.num_past)
    num_chunks = -(-call.num_tokens // cut.chunk)
    grid, bits = (num_chunks, num_heads), (cut.chunk * slots - 1).bit_length()
    sizes = {"P": call.num_past, "SLOTS": slots, "CHUNK": cut.chunk, "BITS": bits, "warps": 4}
    count = Launch(_count_kernel, grid, call.num_tokens, num_blocks, num_chunks, **sizes)
    first_entry = heads_before * call.blocks.num_pairs[call.num_past]
    numbers = (num_blocks, num_chunks, cut.tokens // cut.chunk, call.num_lists, first_entry)
    return count, Launch(_scatter_kernel, grid, *numbers, **sizes, STEP=256)


def build_lists(call: Call, chosen: Tensor, heads_before: int, entries: Tensor, edges: Tensor) -> None:
    """Sorts `chosen`, int32 `[h, T, P]` of global block ids or -1, by (head, block), into `entries` and the head of `edges` of a group,
    of whose heads these come after `heads_before`."""
    num_heads = len(chosen)
    count, scatter = _sort_launches(call, num_heads, heads_before)
    num_chunks = -(-call.num_tokens // call.cut.chunk)
    keys = torch.empty(num_heads, num_chunks, call.cut.chunk * power_of_2(call.num_past), device=chosen.device, dtype=torch.int32)
    counts = torch.zeros(num_heads * call.blocks.count * num_chunks, device=chosen.device, dtype=torch.int32)
    count(chosen, keys, counts)
    scatter(keys, counts.cumsum_(0), entries, edges[heads_before * call.blocks.count :])


def lists_of(call: Call, entries: Tensor, edges: Tensor) -> Lists | None:
    """The lists of a group of heads, whose `edges` have room for more blocks than there may be; None if there are no past blocks."""
    if not call.num_past:
        return None
    rows = edges.as_strided((call.cut.num_ranges + 1, call.num_lists), (call.num_lists, 1))
    return Lists(entries=entries, edges=rows.unbind())


@dataclass(frozen=True, kw_only=True)
class Items:
    """Lists cut into pieces of one size, one program each."""

    ends: Tensor
    """Pieces of all lists up to and with this one, int32 `[H * N]`."""
    piece: Tensor
    """List of each piece, int32 `[bound]`; what is past the last piece is not set."""


@triton.jit
def _pieces_of(BEGIN, END, which, num_lists, SIZE: tl.constexpr, SKIP: tl.constexpr):
    count = tl.load(END + which, mask=which < num_lists, other=0) - tl.load(BEGIN + which, mask=which < num_lists, other=0)
    return tl.maximum((count + SIZE - 1) // SIZE - SKIP, 0)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _cut_kernel(BEGIN, END, ENDS, PIECE, num_lists, SIZE: tl.constexpr, SKIP: tl.constexpr, STEP: tl.constexpr, BEFORE: tl.constexpr):
    # STEP lists a program, which counts the pieces of all lists before them for itself: one launch where a running sum would take two.
    first = tl.program_id(0) * STEP
    before = tl.zeros((BEFORE,), tl.int32)
    for i in range(0, first, BEFORE):
        which = i + tl.arange(0, BEFORE)
        before += tl.where(which < first, _pieces_of(BEGIN, END, which, num_lists, SIZE, SKIP), 0)
    which = first + tl.arange(0, STEP)
    pieces = _pieces_of(BEGIN, END, which, num_lists, SIZE, SKIP)
    end = tl.sum(before, 0) + tl.cumsum(pieces, 0)
    tl.store(ENDS + which, end, mask=which < num_lists)
    for i in range(tl.max(pieces, 0)):
        tl.store(PIECE + end - pieces + i, which, mask=i < pieces)


@once_a_call
def _cut_launch(call: Call, size: int, skip: int) -> Launch:
    sizes = {"SIZE": size, "SKIP": skip, "STEP": 128, "BEFORE": 1024}
    return Launch(_cut_kernel, (-(-call.num_lists // 128), 1), call.num_lists, **sizes, warps=4)


def most_pieces(call: Call, queries: range, size: int, skip: int = 0) -> int:
    """Pieces that `cut_lists` makes, at most: what the host knows of their number."""
    return call.most_pairs(queries) // size + (0 if skip else call.num_lists)


def cut_lists(call: Call, lists: Lists, bound: int, size: int, skip: int = 0) -> Items:
    """At most `bound` pieces of `size` entries, without the first `skip` pieces of each list; a list's last may be short."""
    device = lists.entries.device
    ends = torch.empty(call.num_lists, device=device, dtype=torch.int32)
    piece = torch.empty(bound, device=device, dtype=torch.int32)
    _cut_launch(call, size, skip)(lists.edges[0], lists.edges[-1], ends, piece)
    return Items(ends=ends, piece=piece)
