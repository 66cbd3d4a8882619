"""Forward: past blocks key-major into slots, then the own block, into which the slots are merged.

A partial result is normalised and comes with the base-2 logarithm of its sum of exponentials: merging is then a weighted mean.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.ops.moba.triton import hopper
from model.ops.moba.triton.index import Lists, cut_lists, most_pieces
from model.ops.moba.triton.launch import TABLES, Launch
from model.ops.moba.triton.plan import Call, Tile, num_multiprocessors, once_a_call, tile_of


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _past_resident_kernel(
    Q, K, V, SLOTS, SLOT_LSE, ENTRIES, BEGIN, END, ENDS, PIECE, START, stride_t, stride_h, kv_stride_t, kv_stride_h,
    first_head, group, first_token, range_tokens, num_blocks, num_lists, scale,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr, INT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One block's keys and values stay on chip while SIZE queries of its list pass by.
    pid = tl.program_id(0)
    if pid < tl.load(ENDS + num_lists - 1):
        which = tl.load(PIECE + pid)
        list_begin = tl.load(BEGIN + which)
        count = tl.load(END + which) - list_begin
        begin = (pid - tl.load(ENDS + which) + (count + SIZE - 1) // SIZE) * SIZE
        local_head, block = (which // num_blocks).to(tl.int64), which % num_blocks
        head = first_head + local_head
        dims, rows, keys = tl.arange(0, D), tl.arange(0, BM), tl.arange(0, B)
        key_token = (tl.load(START + block) + keys).to(INT)
        at = key_token[:, None] * kv_stride_t + dims[None, :]
        kv_head = (head // group) * kv_stride_h
        k, v = tl.load(K + kv_head + at), tl.load(V + kv_head + at)
        entries = ENTRIES + list_begin
        slot_base = (local_head * range_tokens - first_token) * P
        for i in tl.range(begin, tl.minimum(begin + SIZE, count), BM, num_stages=STAGES):
            inside = i + rows < count
            entry = tl.load(entries + i + rows, mask=inside, other=0).to(INT)
            q = tl.load(Q + head * stride_h + (entry // P)[:, None] * stride_t + dims[None, :])
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            most = tl.max(score, 1) * scale
            p = tl.exp2(score * scale - most[:, None])  # one instruction beside the exponential
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1 / total)[:, None]
            tl.store(SLOTS + slot_base * D + entry[:, None] * D + dims[None, :], out.to(SLOTS.dtype.element_ty), mask=inside[:, None])
            tl.store(SLOT_LSE + slot_base + entry, most + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _past_streaming_kernel(
    Q, K, V, SLOTS, SLOT_LSE, ENTRIES, BEGIN, END, ENDS, PIECE, START, stride_t, stride_h,
    first_head, group, first_token, range_tokens, num_blocks, num_lists, scale,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # BM queries of one block's list stay on chip while its keys and values pass by, K and V as tensor descriptors [T, Hkv * D].
    pid = tl.program_id(0)
    if pid < tl.load(ENDS + num_lists - 1):
        which = tl.load(PIECE + pid)
        list_begin = tl.load(BEGIN + which)
        count = tl.load(END + which) - list_begin
        begin = (pid - tl.load(ENDS + which) + (count + BM - 1) // BM) * BM
        local_head, block = (which // num_blocks).to(tl.int64), which % num_blocks
        head = first_head + local_head
        dims, rows = tl.arange(0, D), tl.arange(0, BM)
        inside = begin + rows < count
        entry = tl.load(ENTRIES + list_begin + begin + rows, mask=inside, other=0).to(INT)
        q = tl.load(Q + head * stride_h + (entry // P)[:, None] * stride_t + dims[None, :])
        most = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        out = tl.zeros((BM, D), tl.float32)
        start, column = tl.load(START + block), ((head // group) * D).to(tl.int32)
        for j in tl.range(0, B, BN, num_stages=STAGES):
            k = K.load([start + j, column])
            v = V.load([start + j, column])
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            new_most = tl.maximum(most, tl.max(score, 1) * scale)
            p = tl.exp2(score * scale - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            most = new_most
        slot_base = (local_head * range_tokens - first_token) * P
        out = (out * (1 / total)[:, None]).to(SLOTS.dtype.element_ty)
        tl.store(SLOTS + slot_base * D + entry[:, None] * D + dims[None, :], out, mask=inside[:, None])
        tl.store(SLOT_LSE + slot_base + entry, most + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _own_kernel(
    Q, K, V, SLOTS, SLOT_LSE, OUT, LSE, START, LENGTH, DOC_FIRST, stride_t, stride_h, kv_stride_t, kv_stride_h, out_stride_t,
    first_head, group, num_tokens, first_token, end_token, first_block, scale,
    TILES: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block, tile = first_block + pid // TILES, pid % TILES
    start, length = tl.load(START + block), tl.load(LENGTH + block)
    if (tile * BM < length) & (start + tile * BM < end_token) & (start + tile * BM + BM > first_token):
        local_head = tl.program_id(1).to(tl.int64)
        head = first_head + local_head
        dims, keys = tl.arange(0, D), tl.arange(0, BN)
        row = tile * BM + tl.arange(0, BM)
        last = length - 1
        token = (start + tl.minimum(row, last)).to(INT)  # rows and keys past the end repeat the last: no mask on the loads
        inside = (row < length) & (token >= first_token) & (token < end_token)
        q = tl.load(Q + head * stride_h + token[:, None] * stride_t + dims[None, :])
        kv_head = (head // group) * kv_stride_h
        most = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        out = tl.zeros((BM, D), tl.float32)
        for j in tl.range(0, tl.minimum(tile * BM + BM, length), BN, num_stages=STAGES):
            key = j + keys
            at = (start + tl.minimum(key, last)).to(INT)[:, None] * kv_stride_t + dims[None, :]
            k, v = tl.load(K + kv_head + at), tl.load(V + kv_head + at)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            score = tl.where(row[:, None] >= key[None, :], score, float("-inf"))
            new_most = tl.maximum(most, tl.max(score, 1) * scale)
            p = tl.exp2(score * scale - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            most = new_most
        num_past = tl.minimum(P, block - tl.load(DOC_FIRST + block))
        slot_base = local_head * (end_token - first_token) * P
        entry = (tl.minimum(tl.maximum(token, first_token), end_token - 1) - first_token) * P
        for s in tl.range(0, num_past, num_stages=STAGES):
            slot_lse = tl.load(SLOT_LSE + slot_base + entry + s)
            partial = tl.load(SLOTS + slot_base * D + (entry + s)[:, None] * D + dims[None, :]).to(tl.float32)
            new_most = tl.maximum(most, slot_lse)
            shrink, weight = tl.exp2(most - new_most), tl.exp2(slot_lse - new_most)
            total = total * shrink + weight
            out = out * shrink[:, None] + partial * weight[:, None]
            most = new_most
        at = head * D + token[:, None] * out_stride_t + dims[None, :]
        tl.store(OUT + at, (out * (1 / total)[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None])
        tl.store(LSE + head * num_tokens + token, most + tl.log2(total), mask=inside)


def describe(call: Call, x: Tensor, rows: int) -> TensorDescriptor | HopperDescriptor:
    """Keys or values `[T, Hkv, D]`, heads side by side in memory, for the copy engine: `rows` tokens of one head at a time."""
    shape, strides, tile = [call.num_tokens, call.num_kv * call.head_dim], [x.stride(0), 1], [rows, call.head_dim]
    if call.on_hopper:  # the layout is one for all dtypes of 16 bits
        return HopperDescriptor(x, shape, strides, tile, gl.NVMMASharedLayout.get_default_for(tile, gl.float16))
    return TensorDescriptor(x, shape, strides, tile)


def _is_resident(call: Call) -> bool:
    """Whether a block's keys and values stay on chip, and queries pass by."""
    return call.blocks.size <= 128


def _past_tile(call: Call) -> Tile:
    return tile_of("hopper_past" if call.on_hopper else "past", call.blocks.size)


@once_a_call
def _past_launch(call: Call, heads: range, queries: range) -> tuple[Launch, int, int]:
    """The launch, the size of its pieces and how many there are at most."""
    tile = _past_tile(call)
    size = 16 * tile.rows if _is_resident(call) else tile.rows
    bound = most_pieces(call, queries, size)
    numbers: tuple[float, ...] = (heads.start, call.group, queries.start, len(queries), call.blocks.count, call.num_lists, call.scale)
    numbers = (*call.strides, *(call.kv_strides if _is_resident(call) else ()), *numbers)
    sizes = {"B": call.blocks.size, "D": call.head_dim, "P": call.num_past}
    how = {"INT": call.offsets, "STAGES": tile.stages, "warps": tile.warps}
    if _is_resident(call) and call.on_hopper:
        launch = Launch(hopper.past_kernel, (bound, 1), *numbers, **sizes, SIZE=size, INT=call.offsets, warps=tile.warps)
    elif _is_resident(call):
        launch = Launch(_past_resident_kernel, (bound, 1), *numbers, **sizes, BM=tile.rows, SIZE=size, **how)
    elif call.on_hopper:
        programs = min(bound, num_multiprocessors(call.blocks.start.device))
        launch = Launch(hopper.past_streaming_kernel, (programs, 1), *numbers, **sizes, BN=tile.columns, **how)
    else:
        launch = Launch(_past_streaming_kernel, (bound, 1), *numbers, **sizes, BM=tile.rows, BN=tile.columns, **how)
    return launch, size, bound


@once_a_call
def _own_launch(call: Call, heads: range, queries: range) -> Launch:
    blocks = call.blocks
    tile = tile_of("own", blocks.size)
    tiles = -(-blocks.size // tile.rows)
    first_block, last_block = blocks.of(queries.start), blocks.of(queries.stop - 1)
    return Launch(
        _own_kernel, ((last_block - first_block + 1) * tiles, len(heads)), *call.strides, *call.kv_strides, call.num_heads * call.head_dim,
        heads.start, call.group, call.num_tokens, queries.start, queries.stop, first_block, call.scale,
        TILES=tiles, D=call.head_dim, P=call.num_past, BM=tile.rows, BN=tile.columns, INT=call.offsets, STAGES=tile.stages,
        warps=tile.warps,
    )  # fmt: skip


def moba_forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Lists | None, heads: range, queries: range
) -> None:
    """Fills `out` `[T, Hq, D]` and `lse` `[Hq, T]` (base 2) for `heads` and a range of queries, whose `lists` these are."""
    blocks, num_slots = call.blocks, (len(heads), len(queries), call.num_past)
    slots = torch.empty(*num_slots, call.head_dim, device=q.device, dtype=q.dtype)
    slot_lse = torch.empty(num_slots, device=q.device, dtype=torch.float32)
    if lists is not None:
        launch, size, bound = _past_launch(call, heads, queries)
        items = cut_lists(call, lists, bound, size)
        tables = (lists.entries, lists.edges[0], lists.edges[-1], items.ends, items.piece, blocks.start)
        if _is_resident(call):
            launch(q, k, v, slots, slot_lse, *tables)
        else:
            columns = _past_tile(call).columns
            launch(q, describe(call, k, columns), describe(call, v, columns), slots, slot_lse, *tables)
    _own_launch(call, heads, queries)(q, k, v, slots, slot_lse, out, lse, blocks.start, blocks.length, blocks.doc_first)
