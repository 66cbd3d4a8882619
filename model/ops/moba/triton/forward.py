"""Forward: past blocks key-major into slots, then the own block, into which the slots are merged.

A partial result is normalised and comes with the base-2 logarithm of its sum of exponentials: merging is then a weighted mean.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.ops.moba.triton.index import Lists, cut_lists
from model.ops.moba.triton.plan import Blocks, tile_of


@triton.jit
def _past_resident_kernel(
    Q, K, V, SLOTS, SLOT_LSE, ENTRIES, OFFSET, COUNT, ENDS, PIECE, START, stride_t, stride_h, kv_stride_t, kv_stride_h,
    first_head, group, num_tokens, num_blocks, num_lists, scale,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One block's keys and values stay on chip while SIZE queries of its list pass by.
    pid = tl.program_id(0)
    if pid < tl.load(ENDS + num_lists - 1):
        which = tl.load(PIECE + pid)
        count = tl.load(COUNT + which)
        begin = (pid - tl.load(ENDS + which) + (count + SIZE - 1) // SIZE) * SIZE
        local_head, block = (which // num_blocks).to(tl.int64), which % num_blocks
        head = first_head + local_head
        dims, rows, keys = tl.arange(0, D), tl.arange(0, BM), tl.arange(0, B)
        key_token = (tl.load(START + block) + keys).to(tl.int64)
        at = key_token[:, None] * kv_stride_t + (head // group) * kv_stride_h + dims[None, :]
        k, v = tl.load(K + at), tl.load(V + at)
        entries = ENTRIES + tl.load(OFFSET + which)
        for i in tl.range(begin, tl.minimum(begin + SIZE, count), BM, num_stages=STAGES):
            inside = i + rows < count
            entry = tl.load(entries + i + rows, mask=inside, other=0).to(tl.int64)
            q = tl.load(Q + (entry // P)[:, None] * stride_t + head * stride_h + dims[None, :])
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            most = tl.max(score, 1)
            p = tl.exp2(score - most[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
            slot = local_head * num_tokens * P + entry
            tl.store(SLOTS + slot[:, None] * D + dims[None, :], out.to(SLOTS.dtype.element_ty), mask=inside[:, None])
            tl.store(SLOT_LSE + slot, most + tl.log2(total), mask=inside)


@triton.jit
def _past_streaming_kernel(
    Q, K, V, SLOTS, SLOT_LSE, ENTRIES, OFFSET, COUNT, ENDS, PIECE, START, stride_t, stride_h,
    first_head, group, num_tokens, num_blocks, num_lists, scale,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # BM queries of one block's list stay on chip while its keys and values pass by, K and V as tensor descriptors [T, Hkv * D].
    pid = tl.program_id(0)
    if pid < tl.load(ENDS + num_lists - 1):
        which = tl.load(PIECE + pid)
        count = tl.load(COUNT + which)
        begin = (pid - tl.load(ENDS + which) + (count + BM - 1) // BM) * BM
        local_head, block = (which // num_blocks).to(tl.int64), which % num_blocks
        head = first_head + local_head
        dims, rows = tl.arange(0, D), tl.arange(0, BM)
        inside = begin + rows < count
        entry = tl.load(ENTRIES + tl.load(OFFSET + which) + begin + rows, mask=inside, other=0).to(tl.int64)
        q = tl.load(Q + (entry // P)[:, None] * stride_t + head * stride_h + dims[None, :])
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
        slot = local_head * num_tokens * P + entry
        tl.store(SLOTS + slot[:, None] * D + dims[None, :], (out / total[:, None]).to(SLOTS.dtype.element_ty), mask=inside[:, None])
        tl.store(SLOT_LSE + slot, most + tl.log2(total), mask=inside)


@triton.jit
def _own_kernel(
    Q, K, V, SLOTS, SLOT_LSE, OUT, LSE, START, LENGTH, DOC_FIRST, stride_t, stride_h, kv_stride_t, kv_stride_h, out_stride_t,
    first_head, group, num_tokens, scale,
    TILES: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block, tile = pid // TILES, pid % TILES
    start, length = tl.load(START + block), tl.load(LENGTH + block)
    if tile * BM < length:
        local_head = tl.program_id(1).to(tl.int64)
        head = first_head + local_head
        dims, keys = tl.arange(0, D), tl.arange(0, BN)
        row = tile * BM + tl.arange(0, BM)
        inside = row < length
        token = (start + tl.minimum(row, length - 1)).to(tl.int64)  # rows and keys past the end repeat the last: no mask on the loads
        q = tl.load(Q + token[:, None] * stride_t + head * stride_h + dims[None, :])
        most = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        out = tl.zeros((BM, D), tl.float32)
        for j in tl.range(0, tl.minimum(tile * BM + BM, length), BN, num_stages=STAGES):
            key = j + keys
            at = (start + tl.minimum(key, length - 1)).to(tl.int64)[:, None] * kv_stride_t + (head // group) * kv_stride_h + dims[None, :]
            k, v = tl.load(K + at), tl.load(V + at)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            score = tl.where(row[:, None] >= key[None, :], score, float("-inf"))
            new_most = tl.maximum(most, tl.max(score, 1))
            p = tl.exp2(score - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            most = new_most
        num_past = tl.minimum(P, block - tl.load(DOC_FIRST + block))
        for s in tl.range(0, num_past, num_stages=STAGES):
            slot = (local_head * num_tokens + token) * P + s
            slot_lse = tl.load(SLOT_LSE + slot)
            partial = tl.load(SLOTS + slot[:, None] * D + dims[None, :]).to(tl.float32)
            new_most = tl.maximum(most, slot_lse)
            shrink, weight = tl.exp2(most - new_most), tl.exp2(slot_lse - new_most)
            total = total * shrink + weight
            out = out * shrink[:, None] + partial * weight[:, None]
            most = new_most
        at = token[:, None] * out_stride_t + head * D + dims[None, :]
        tl.store(OUT + at, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None])
        tl.store(LSE + head * num_tokens + token, most + tl.log2(total), mask=inside)


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """Keys or values `[T, Hkv, D]`, heads side by side in memory, for the copy engine: `rows` tokens of one head at a time."""
    num_tokens, num_heads, head_dim = x.shape
    return TensorDescriptor(x, [num_tokens, num_heads * head_dim], [x.stride(0), 1], [rows, head_dim])


def moba_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    blocks: Blocks, lists: Lists | None, heads: range, num_past: int, scale: float,
) -> None:  # fmt: skip
    """Fills `out` `[T, Hq, D]` and `lse` `[Hq, T]` (base 2) for `heads`; `scale` is that of the softmax times log2 e."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    slots = torch.empty(len(heads), num_tokens, num_past, head_dim, device=q.device, dtype=q.dtype)
    slot_lse = torch.empty(len(heads), num_tokens, num_past, device=q.device, dtype=torch.float32)
    if lists is not None:
        resident = blocks.size <= 128
        tile = tile_of("past", blocks.size)
        size = 16 * tile.rows if resident else tile.rows
        items = cut_lists(lists, size)
        tables = (lists.entries, lists.offset, lists.count, items.ends, items.piece, blocks.start)
        numbers = (heads.start, group, num_tokens, blocks.count, len(lists.count), scale)
        sizes = {"B": blocks.size, "D": head_dim, "P": num_past, "BM": tile.rows, "STAGES": tile.stages, "num_warps": tile.warps}
        if resident:
            _past_resident_kernel[(items.bound,)](q, k, v, slots, slot_lse, *tables, *strides, *numbers, SIZE=size, **sizes)
        else:
            described = (describe(k, tile.columns), describe(v, tile.columns))
            _past_streaming_kernel[(items.bound,)](
                q, *described, slots, slot_lse, *tables, *strides[:2], *numbers, BN=tile.columns, **sizes
            )
    tile = tile_of("own", blocks.size)
    tiles = triton.cdiv(blocks.size, tile.rows)
    _own_kernel[(blocks.count * tiles, len(heads))](
        q, k, v, slots, slot_lse, out, lse, blocks.start, blocks.length, blocks.doc_first, *strides, out.stride(0), heads.start, group,
        num_tokens, scale, TILES=tiles, D=head_dim, P=num_past, BM=tile.rows, BN=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
