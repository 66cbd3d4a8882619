"""Block means, and the choice of blocks without a score ever leaving the chip (MoBA eq. 4-6)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.moba.triton import hopper
from model.ops.moba.triton.launch import TABLES, Launch
from model.ops.moba.triton.plan import Call, once_a_call, tile_of
from model.ops.moba.triton.schedule import power_of_2


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _means_kernel(K, MEAN, START, LENGTH, stride_t, stride_h, num_blocks, B: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = tl.load(START + block), tl.load(LENGTH + block)
    dims, rows = tl.arange(0, D), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, B, ROWS):
        inside = first + rows < length
        tokens = (start + first + rows).to(tl.int64)
        total += tl.load(K + tokens[:, None] * stride_t + head * stride_h + dims[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(MEAN + (head * num_blocks + block) * D + dims, tl.sum(total, 0) / length)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _centre_kernel(HIGH, LOW, NORM, MEAN, DOC_FIRST, num_blocks, D: tl.constexpr):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, D)
    second = tl.minimum(tl.load(DOC_FIRST + block) + 1, num_blocks - 1)  # a document without one has no query with a choice
    centre = tl.load(MEAN + (head * num_blocks + second) * D + dims)
    centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
    at = (head * num_blocks + block) * D + dims
    mean = 0.5 * tl.load(MEAN + at) - 0.5 * centre
    high = mean.to(HIGH.dtype.element_ty)
    low = (mean - high.to(tl.float32)).to(LOW.dtype.element_ty)
    kept = high.to(tl.float32) + low.to(tl.float32)
    norm = tl.sqrt(tl.sum(kept * kept, 0)) + 2e-18  # a sum of squares that underflows is no zero
    is_finite = norm < float("inf")
    tl.store(HIGH + at, tl.where(is_finite, high, 0.0))
    tl.store(LOW + at, tl.where(is_finite, low, 0.0))
    tl.store(NORM + head * num_blocks + block, tl.where(is_finite, norm, 0.0))


@dataclass(frozen=True, kw_only=True)
class Means:
    """Half of what each block's mean key, by key/value head, is beyond its document's centre; zeros where that is not finite, so that
    every score is.

    Taking one vector from all means of a document changes no order of scores. What trained keys have in common can be far longer than what
    tells them apart, and would take its bits. The centre is the mean of the document's second block: past for every query that has a
    choice, which therefore hangs on no later key, and without the sinks of the first. Half the difference of two means is in k's range.
    """

    high: Tensor
    """In k's dtype `[Hkv, N, D]`."""
    low: Tensor
    """What `high` lacks, in k's dtype `[Hkv, N, D]`: their sum has twice its mantissa."""
    norm: Tensor
    """Euclidean, fp32 `[Hkv, N]`."""


@once_a_call
def _means_launches(call: Call) -> tuple[Launch, Launch]:
    blocks = call.blocks
    grid, sizes = (blocks.count, call.num_kv), {"B": blocks.size, "D": call.head_dim, "ROWS": 64}
    means = Launch(_means_kernel, grid, *call.kv_strides, blocks.count, **sizes, warps=4)
    return means, Launch(_centre_kernel, grid, blocks.count, D=call.head_dim, warps=1)


def block_means(call: Call, k: Tensor) -> Means:
    """Of k `[T, Hkv, D]`, summed in fp32."""
    blocks = call.blocks
    mean = torch.empty(call.num_kv, blocks.count, call.head_dim, device=k.device, dtype=torch.float32)
    high, low = (torch.empty(mean.shape, device=k.device, dtype=k.dtype) for _ in range(2))
    norm = torch.empty(call.num_kv, blocks.count, device=k.device, dtype=torch.float32)
    launch_means, launch_centre = _means_launches(call)
    launch_means(k, mean, blocks.start, blocks.length)
    launch_centre(high, low, norm, mean, blocks.doc_first)
    return Means(high=high, low=low, norm=norm)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _gate_kernel(
    Q, HIGH, LOW, NORM, CHOSEN, START, LENGTH, DOC_FIRST, stride_t, stride_h, first_head, group, num_tokens, num_blocks,
    TILES: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # A score becomes an integer of 23 bits, in steps of 2^-22 of what |q| and the longest of the query's past means allow: adding
    # 1.5 * 2^23 leaves it in the low bits of a float. Shifted up, it makes room for the column: one integer maximum then finds score and
    # column at once, and of equal scores the lower column. Kept scores have all their low bits set: of equal ones the earlier tile stays.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # queries with the most past blocks first
    block, tile = pid // TILES, pid % TILES
    local_head = tl.program_id(1).to(tl.int64)
    start, length = tl.load(START + block), tl.load(LENGTH + block)
    doc_first = tl.load(DOC_FIRST + block)
    num_past = block - doc_first
    row = tile * BQ + tl.arange(0, BQ)
    inside = row < length
    token = (start + row).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    out = CHOSEN + (local_head * num_tokens + token[:, None]) * P + slot[None, :]
    out_mask = inside[:, None] & (slot < P)[None, :]
    if num_past <= P:
        all_past = tl.where(slot < num_past, doc_first + slot, -1)
        tl.store(out, tl.broadcast_to(all_past[None, :], (BQ, SLOTS)), mask=out_mask)
    elif tile * BQ < length:
        head = first_head + local_head
        dims, column, step = tl.arange(0, D), tl.arange(0, BN), tl.arange(0, 128)
        queries = Q + token[:, None] * stride_t + head * stride_h + dims[None, :]
        q = tl.load(queries, mask=inside[:, None], other=0.0).to(tl.float32)
        means = (head // group) * num_blocks
        longest = tl.zeros((128,), tl.float32)
        for first in range(doc_first, block, 128):
            longest = tl.maximum(longest, tl.load(NORM + means + first + step, mask=first + step < block, other=0.0))
        most = (tl.sqrt(tl.sum(q * q, 1)) + 2e-18) * (1.01 * tl.max(longest, 0))  # no score is as large
        # A score that is not finite could outrank what marks the end. Read again, the products take q from shared memory.
        q = tl.load(queries, mask=(inside & (most < float("inf")))[:, None], other=0.0)
        exponent = tl.maximum(most, 1e-30).to(tl.int32, bitcast=True) >> 23
        scale = ((127 + 22 + 126 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^22 over the next power of two, exactly
        best = tl.where(slot[None, :] < P, -2147483648, 2147483647) + tl.zeros((BQ, SLOTS), tl.int32)
        kept = tl.zeros((BQ, SLOTS), tl.int32) - 1 - slot[None, :]  # all different, always
        least = tl.min(best, 1)
        for first in tl.range(doc_first, block, BN, num_stages=STAGES):
            valid = first + column < block
            at = (means + first + column)[:, None] * D + dims[None, :]
            high = tl.load(HIGH + at, mask=valid[:, None], other=0.0)
            low = tl.load(LOW + at, mask=valid[:, None], other=0.0)
            score = tl.dot(q, tl.trans(high), input_precision="ieee")
            score = tl.dot(q, tl.trans(low), score, input_precision="ieee")
            # A column past the end has score 0, and is set to less than any score can be.
            rounded = score * scale[:, None] + tl.where(valid, 12582912.0, 8388608.0)[None, :]
            key = rounded.to(tl.int32, bitcast=True) * BN + (BN - 1 - column)[None, :]  # the float's exponent leaves at the top
            more = tl.sum((key > least[:, None]).to(tl.int32), 1)  # no row takes in more than that, nor than its slots
            top = tl.full((BQ,), 2147483647, tl.int32)
            for _ in range(tl.minimum(tl.max(more, 0), P)):
                # The next lower key: differences to it, without a sign, wrap around for what is lower, and are largest for the nearest.
                gap = (key - top[:, None]).to(tl.uint32, bitcast=True)
                top += tl.max(gap, 1).to(tl.int32, bitcast=True)
                last = tl.max(tl.where(best == least[:, None], kept, -SLOTS - 1), 1)  # of the least, the block that came last
                here = (kept == last[:, None]) & (top > least)[:, None]
                best = tl.where(here, (top | (BN - 1))[:, None], best)
                kept = tl.where(here, (first + BN - 1 - (top & (BN - 1)))[:, None], kept)
                least = tl.min(best, 1)
        tl.store(out, kept, mask=out_mask)


@once_a_call
def _gate_launch(call: Call, heads: range) -> Launch:
    blocks, slots = call.blocks, power_of_2(call.num_past)
    tile = tile_of("hopper_gate" if call.on_hopper else "gate", blocks.size)
    tiles = -(-blocks.size // tile.rows)
    columns = max(16, min(tile.columns, power_of_2(blocks.max_past)))
    grid, numbers = (blocks.count * tiles, len(heads)), (*call.strides, heads.start, call.group, call.num_tokens, blocks.count)
    sizes = {"TILES": tiles, "D": call.head_dim, "P": call.num_past, "BQ": tile.rows, "BN": columns}
    if call.on_hopper:
        # Two programs of 8 warps have the registers of a multiprocessor.
        registers = 128 if tile.warps == 8 else None
        return Launch(hopper.gate_kernel, grid, *numbers, **sizes, SLOTS=max(8, slots), warps=tile.warps, registers=registers)
    return Launch(_gate_kernel, grid, *numbers, **sizes, SLOTS=slots, STAGES=tile.stages, warps=tile.warps)


def choose_blocks(call: Call, q: Tensor, means: Means, heads: range) -> Tensor:
    """Global ids of the chosen past blocks of `heads`: int32 `[heads, T, P]`, in no order, then -1 where there are fewer.

    Scores are fp32 sums of products with the two halves of each mean less the centre, rounded to steps of at most 2**-20 of ‖q‖ times the
    longest such difference of the query's past blocks: the choice is that of exact arithmetic except where two scores differ by less than
    such a step, 2**-17 of ‖q‖·‖mean - centre‖ (in fp16, whose halves end at 2**-25, also 2**-24 of the sum of |q|) and what fp32 rounds in
    summing the keys. Ties go to the lower block.
    """
    blocks = call.blocks
    chosen = torch.empty(len(heads), call.num_tokens, call.num_past, device=q.device, dtype=torch.int32)
    _gate_launch(call, heads)(q, means.high, means.low, means.norm, chosen, blocks.start, blocks.length, blocks.doc_first)
    return chosen
