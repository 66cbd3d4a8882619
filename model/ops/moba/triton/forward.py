"""Forward: past blocks key-major into slots, then the own block, into which the slots are merged.

A partial result is normalised and comes with the base-2 logarithm of its sum of exponentials: merging is then a weighted mean.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.ops.moba.triton.index import Lists, cut_lists
from model.ops.moba.triton.launch import launch
from model.ops.moba.triton.plan import Blocks, offsets, tile_of


@triton.jit
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
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            most = tl.max(score, 1)
            p = tl.exp2(score - most[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
            tl.store(SLOTS + slot_base * D + entry[:, None] * D + dims[None, :], out.to(SLOTS.dtype.element_ty), mask=inside[:, None])
            tl.store(SLOT_LSE + slot_base + entry, most + tl.log2(total), mask=inside)


@triton.jit
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
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            new_most = tl.maximum(most, tl.max(score, 1))
            p = tl.exp2(score - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            most = new_most
        slot_base = (local_head * range_tokens - first_token) * P
        out = (out / total[:, None]).to(SLOTS.dtype.element_ty)
        tl.store(SLOTS + slot_base * D + entry[:, None] * D + dims[None, :], out, mask=inside[:, None])
        tl.store(SLOT_LSE + slot_base + entry, most + tl.log2(total), mask=inside)


@triton.jit
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
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            score = tl.where(row[:, None] >= key[None, :], score, float("-inf"))
            new_most = tl.maximum(most, tl.max(score, 1))
            p = tl.exp2(score - new_most[:, None])
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
        tl.store(OUT + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None])
        tl.store(LSE + head * num_tokens + token, most + tl.log2(total), mask=inside)


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """Keys or values `[T, Hkv, D]`, heads side by side in memory, for the copy engine: `rows` tokens of one head at a time."""
    num_tokens, num_heads, head_dim = x.shape
    return TensorDescriptor(x, [num_tokens, num_heads * head_dim], [x.stride(0), 1], [rows, head_dim])


def moba_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, blocks: Blocks, lists: Lists | None, heads: range, queries: range,
    num_past: int, scale: float,
) -> None:  # fmt: skip
    """Fills `out` `[T, Hq, D]` and `lse` `[Hq, T]` (base 2) for `heads` and a range of queries, whose `lists` these are.

    `scale` is that of the softmax times log2 e.
    """
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    slots = torch.empty(len(heads), len(queries), num_past, head_dim, device=q.device, dtype=q.dtype)
    slot_lse = torch.empty(len(heads), len(queries), num_past, device=q.device, dtype=torch.float32)
    int_type = offsets(*(num_tokens * x.stride(0) for x in (q, k, out)), num_tokens * max(1, num_past) * head_dim)
    if lists is not None:
        resident = blocks.size <= 128
        tile = tile_of("past", blocks.size)
        size = 16 * tile.rows if resident else tile.rows
        items = cut_lists(lists, size)
        tables = (lists.entries, lists.edges[0], lists.edges[-1], items.ends, items.piece, blocks.start)
        numbers = (heads.start, group, queries.start, len(queries), blocks.count, len(items.ends), scale)
        sizes = {"B": blocks.size, "D": head_dim, "P": num_past, "BM": tile.rows}
        how = {"INT": int_type, "STAGES": tile.stages, "warps": tile.warps}
        if resident:
            args: tuple[Any, ...] = (q, k, v, slots, slot_lse, *tables, *strides, *numbers)
            launch(_past_resident_kernel, (items.bound, 1), *args, **sizes, SIZE=size, **how)
        else:
            args = (q, describe(k, tile.columns), describe(v, tile.columns), slots, slot_lse, *tables, *strides[:2], *numbers)
            launch(_past_streaming_kernel, (items.bound, 1), *args, **sizes, BN=tile.columns, **how)
    tile = tile_of("own", blocks.size)
    tiles = triton.cdiv(blocks.size, tile.rows)
    first_block, last_block = blocks.of(queries.start), blocks.of(queries.stop - 1)
    launch(
        _own_kernel, ((last_block - first_block + 1) * tiles, len(heads)), q, k, v, slots, slot_lse, out, lse, blocks.start, blocks.length,
        blocks.doc_first, *strides, out.stride(0), heads.start, group, num_tokens, queries.start, queries.stop, first_block, scale,
        TILES=tiles, D=head_dim, P=num_past, BM=tile.rows, BN=tile.columns, INT=int_type, STAGES=tile.stages, warps=tile.warps,
    )  # fmt: skip
