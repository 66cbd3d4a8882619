"""Who chose each block: a stable counting sort of (query, slot) by (head, block), the same in every run.

A chunk of queries is sorted on chip and counted; the running sum of all counts, by head, block and chunk, says where each chunk's part of
each list goes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.moba.triton.plan import Blocks, power_of_2

_NONE = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The queries that chose each block, of a group of H heads; int32."""

    entries: Tensor
    """query * P + slot, list after list, by query in each `[pairs]`."""
    offset: Tensor
    """First entry of the list of (head, block) `[H * N]`."""
    count: Tensor
    """Entries in it `[H * N]`."""


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
    KEYS, COUNTS, ENDS, ENTRIES, num_blocks, num_chunks, P: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr
):
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


def build_lists(chosen: Tensor, blocks: Blocks) -> Lists:
    """Sorts `chosen`, int32 `[H, T, P]` of global block ids or -1, by (head, block)."""
    num_heads, num_tokens, num_past = chosen.shape
    slots = power_of_2(num_past)
    chunk = max(16, 1024 // slots)
    num_chunks = triton.cdiv(num_tokens, chunk)
    bits = (chunk * slots - 1).bit_length()
    keys = torch.empty(num_heads, num_chunks, chunk * slots, device=chosen.device, dtype=torch.int32)
    counts = torch.zeros(num_heads * blocks.count, num_chunks, device=chosen.device, dtype=torch.int32)
    entries = torch.empty(num_heads * blocks.num_pairs[num_past], device=chosen.device, dtype=torch.int32)
    grid, sizes = (num_chunks, num_heads), {"P": num_past, "SLOTS": slots, "CHUNK": chunk, "BITS": bits, "num_warps": 4}
    _count_kernel[grid](chosen, keys, counts, num_tokens, blocks.count, num_chunks, **sizes)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32).view_as(counts)
    _scatter_kernel[grid](keys, counts, ends, entries, blocks.count, num_chunks, **sizes)
    offset = ends[:, 0] - counts[:, 0]
    return Lists(entries=entries, offset=offset, count=ends[:, -1] - offset)


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
def _pieces_kernel(COUNT, ENDS, PIECE, SIZE: tl.constexpr, SKIP: tl.constexpr, STEP: tl.constexpr):
    which = tl.program_id(0)
    pieces = tl.maximum((tl.load(COUNT + which) + SIZE - 1) // SIZE - SKIP, 0)
    first = tl.load(ENDS + which) - pieces
    step = tl.arange(0, STEP)
    for i in range(0, pieces, STEP):
        tl.store(PIECE + first + i + step, tl.full((STEP,), 0, tl.int32) + which, mask=i + step < pieces)


def cut_lists(lists: Lists, size: int, *, skip: int = 0) -> Items:
    """Pieces of `size` entries, without the first `skip` of each list; a list's last may be short."""
    num_lists = len(lists.count)
    bound = len(lists.entries) // size + (0 if skip else num_lists)
    ends = ((lists.count + (size - 1)) // size - skip).clamp_(min=0).cumsum(0, dtype=torch.int32)
    piece = torch.empty(bound, device=ends.device, dtype=torch.int32)
    if bound:
        _pieces_kernel[(num_lists,)](lists.count, ends, piece, size, skip, 64, num_warps=1)
    return Items(ends=ends, piece=piece, bound=bound)
