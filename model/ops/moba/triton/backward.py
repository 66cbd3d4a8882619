"""Backward: probabilities recomputed from the final log-sum-exp (FlashAttention-2, arXiv 2307.08691), no atomics.

dK and dV are summed where their keys are, over the block's own queries and those of its list. dQ comes by slots: where a block's keys
fit one tile they leave it on the way, otherwise a second pass over the lists computes it. A last pass adds the own block and the slots.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.moba.triton import hopper
from model.ops.moba.triton.forward import describe
from model.ops.moba.triton.index import Lists, cut_lists, most_pieces
from model.ops.moba.triton.launch import TABLES, Launch
from model.ops.moba.triton.plan import Call, num_multiprocessors, once_a_call, tile_of
from model.ops.moba.triton.schedule import SPLIT

# No list is cut into pieces of fewer entries.
_LEAST_SPLIT = 8192


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _delta_kernel(OUT, D_OUT, DELTA, num_tokens, out_stride_t, grad_stride_t, grad_stride_h, D: tl.constexpr, ROWS: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside, dims = token < num_tokens, tl.arange(0, D)
    out = tl.load(OUT + token[:, None] * out_stride_t + head * D + dims[None, :], mask=inside[:, None], other=0.0)
    grad = tl.load(D_OUT + token[:, None] * grad_stride_t + head * grad_stride_h + dims[None, :], mask=inside[:, None], other=0.0)
    tl.store(DELTA + head * num_tokens + token, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1), mask=inside)


@triton.jit
def _key_tile(q_at, do_at, lse_at, delta_at, inside, k, v, dk, dv, row, key, scale, dq_at, OWN: tl.constexpr, KEEP_DQ: tl.constexpr):
    # One tile of queries against one of keys. Queries that are not inside repeat another. With 128 keys the scores stand transposed,
    # keys down, since dK and dV then take them from registers; with 64 keys and 4 warps the other way round spills less.
    q, do, delta = tl.load(q_at), tl.load(do_at), tl.load(delta_at)
    lse = tl.where(inside, tl.load(lse_at), float("inf"))  # probability 0
    KEYS_DOWN: tl.constexpr = k.shape[0] == 128
    if KEYS_DOWN:
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
        if OWN:
            p = tl.where(row[None, :] >= key[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = (p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        ds = tl.trans(ds)
    else:
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        if OWN:
            p = tl.where(row[:, None] >= key[None, :], p, 0.0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="ieee")
        ds = (p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    if KEEP_DQ and not OWN:
        tl.store(dq_at, tl.dot(ds, k, input_precision="ieee").to(q.dtype), mask=inside[:, None])
    return dk, dv


@triton.jit
def _list_tiles(
    Q, D_OUT, LSE, DELTA, DQ_SLOTS, ENTRIES, begin, end, stride_t, grad_stride_t, k, v, dk, dv, scale,
    D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, KEEP_DQ: tl.constexpr, INT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Entries begin..end of one list; the pointers are those of its head.
    dims, rows = tl.arange(0, D), tl.arange(0, BM)
    for i in tl.range(begin, end, BM, num_stages=STAGES):
        inside = i + rows < end
        entry = tl.load(ENTRIES + i + rows, mask=inside, other=0).to(INT)
        token = entry // P
        dk, dv = _key_tile(
            Q + token[:, None] * stride_t + dims[None, :], D_OUT + token[:, None] * grad_stride_t + dims[None, :],
            LSE + token, DELTA + token, inside, k, v, dk, dv, rows, dims, scale, DQ_SLOTS + entry[:, None] * D + dims[None, :],
            False, KEEP_DQ,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _dk_dv_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DK, DV, PARTIAL, DQ_SLOTS, ENTRIES, BEGIN, END, ENDS, PIECE, START, LENGTH,
    stride_t, stride_h, kv_stride_t, kv_stride_h, grad_stride_t, grad_stride_h, dk_stride_t,
    first_head, group, num_tokens, num_blocks, num_lists, scale, softmax_scale,
    TILES: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, KEEP_DQ: tl.constexpr,
    LISTS: tl.constexpr, LONG: tl.constexpr, INT: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # LONG: what a list holds past its first SPLIT entries, SPLIT at a time, into sums that the other launch adds up in order.
    tile = tl.program_id(0) % TILES
    if LONG:
        piece = tl.program_id(0) // TILES
        is_there = piece < tl.load(ENDS + num_lists - 1)
        which = tl.load(PIECE + piece, mask=is_there, other=0)
        block, first_local, num_heads = which % num_blocks, which // num_blocks, 1
    else:
        is_there = True
        block, first_local, num_heads = tl.program_id(0) // TILES, tl.program_id(1) * group, group
    start, length = tl.load(START + block), tl.load(LENGTH + block)
    if is_there & (tile * BK < length):
        kv_head = ((first_head + first_local) // group).to(tl.int64)
        dims, rows, keys = tl.arange(0, D), tl.arange(0, BM), tl.arange(0, BK)
        key = tile * BK + keys
        at = (start + tl.minimum(key, length - 1)).to(INT)[:, None] * kv_stride_t + dims[None, :]
        k, v = tl.load(K + kv_head * kv_stride_h + at), tl.load(V + kv_head * kv_stride_h + at)
        dk, dv = tl.zeros((BK, D), tl.float32), tl.zeros((BK, D), tl.float32)
        for g in range(num_heads):
            local_head = (first_local + g).to(tl.int64)
            head = first_head + local_head
            q_head, do_head = Q + head * stride_h, D_OUT + head * grad_stride_h
            lse_head, delta_head = LSE + head * num_tokens, DELTA + head * num_tokens
            if not LONG:
                for i in tl.range(tile * BK, length, BM, num_stages=1):
                    row = i + rows
                    token = (start + tl.minimum(row, length - 1)).to(INT)
                    dk, dv = _key_tile(
                        q_head + token[:, None] * stride_t + dims[None, :], do_head + token[:, None] * grad_stride_t + dims[None, :],
                        lse_head + token, delta_head + token, row < length, k, v, dk, dv, row, key, scale, DQ_SLOTS, True, KEEP_DQ,
                    )  # fmt: skip
            if LISTS:
                listed = local_head * num_blocks + block
                list_begin = tl.load(BEGIN + listed)
                count = tl.load(END + listed) - list_begin
                begin = (piece - tl.load(ENDS + listed) + (count + SPLIT - 1) // SPLIT) * SPLIT if LONG else 0
                rest = count - begin
                end = begin + tl.where(rest < SPLIT, rest, SPLIT)  # not tl.minimum, after which 47 registers a tile spill (Triton 3.6)
                dk, dv = _list_tiles(
                    q_head, do_head, lse_head, delta_head, DQ_SLOTS + local_head * num_tokens * P * D, ENTRIES + list_begin,
                    begin, end, stride_t, grad_stride_t, k, v, dk, dv, scale, D, P, BM, KEEP_DQ, INT, STAGES,
                )  # fmt: skip
                if not LONG:  # noqa: SIM102 - of a constant, then of a tensor
                    if count > SPLIT:
                        pieces = (count - 1) // SPLIT
                        first = (tl.load(ENDS + listed) - pieces).to(tl.int64)
                        for nth in range(pieces):
                            partial = PARTIAL + ((first + nth) * TILES + tile) * (2 * BK * D) + keys[:, None] * D + dims[None, :]
                            dk += tl.load(partial)
                            dv += tl.load(partial + BK * D)
        if LONG:
            partial = PARTIAL + tl.program_id(0).to(tl.int64) * (2 * BK * D) + keys[:, None] * D + dims[None, :]
            tl.store(partial, dk)
            tl.store(partial + BK * D, dv)
        else:
            at = kv_head * D + (start + key).to(INT)[:, None] * dk_stride_t + dims[None, :]
            real = (key < length)[:, None]
            tl.store(DK + at, (dk * softmax_scale).to(DK.dtype.element_ty), mask=real)
            tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=real)


@triton.jit
def _query_tile(q, do, lse, delta, k, v, dq, scale, causal, OWN: tl.constexpr):
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    if OWN:
        p = tl.where(causal, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _dq_past_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DQ_SLOTS, ENTRIES, BEGIN, END, ENDS, PIECE, START,
    stride_t, stride_h, kv_stride_t, kv_stride_h, grad_stride_t, grad_stride_h,
    first_head, group, num_tokens, first_token, range_tokens, num_blocks, num_lists, scale,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, INT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < tl.load(ENDS + num_lists - 1):
        which = tl.load(PIECE + pid)
        list_begin = tl.load(BEGIN + which)
        count = tl.load(END + which) - list_begin
        begin = (pid - tl.load(ENDS + which) + (count + BM - 1) // BM) * BM
        local_head, block = (which // num_blocks).to(tl.int64), which % num_blocks
        head = first_head + local_head
        dims, rows, keys = tl.arange(0, D), tl.arange(0, BM), tl.arange(0, BN)
        inside = begin + rows < count
        entry = tl.load(ENTRIES + list_begin + begin + rows, mask=inside, other=0).to(INT)
        token = entry // P
        q = tl.load(Q + head * stride_h + token[:, None] * stride_t + dims[None, :])
        do = tl.load(D_OUT + head * grad_stride_h + token[:, None] * grad_stride_t + dims[None, :])
        lse, delta = tl.load(LSE + head * num_tokens + token), tl.load(DELTA + head * num_tokens + token)
        dq = tl.zeros((BM, D), tl.float32)
        start = tl.load(START + block)
        kv_head = (head // group) * kv_stride_h
        for j in tl.range(0, B, BN, num_stages=STAGES):
            at = (start + j + keys).to(INT)[:, None] * kv_stride_t + dims[None, :]
            dq = _query_tile(q, do, lse, delta, tl.load(K + kv_head + at), tl.load(V + kv_head + at), dq, scale, True, False)
        slot_base = (local_head * range_tokens - first_token) * P
        tl.store(DQ_SLOTS + slot_base * D + entry[:, None] * D + dims[None, :], dq.to(q.dtype), mask=inside[:, None])


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _dq_own_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DQ_SLOTS, DQ, START, LENGTH, DOC_FIRST,
    stride_t, stride_h, kv_stride_t, kv_stride_h, grad_stride_t, grad_stride_h, dq_stride_t,
    first_head, group, num_tokens, first_token, end_token, first_block, scale, softmax_scale,
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
        token = (start + tl.minimum(row, length - 1)).to(INT)
        inside = (row < length) & (token >= first_token) & (token < end_token)
        q = tl.load(Q + head * stride_h + token[:, None] * stride_t + dims[None, :])
        do = tl.load(D_OUT + head * grad_stride_h + token[:, None] * grad_stride_t + dims[None, :])
        kv_head = (head // group) * kv_stride_h
        lse, delta = tl.load(LSE + head * num_tokens + token), tl.load(DELTA + head * num_tokens + token)
        dq = tl.zeros((BM, D), tl.float32)
        for j in tl.range(0, tl.minimum(tile * BM + BM, length), BN, num_stages=STAGES):
            key = j + keys
            at = (start + tl.minimum(key, length - 1)).to(INT)[:, None] * kv_stride_t + dims[None, :]
            k, v = tl.load(K + kv_head + at), tl.load(V + kv_head + at)
            dq = _query_tile(q, do, lse, delta, k, v, dq, scale, row[:, None] >= key[None, :], True)
        num_past = tl.minimum(P, block - tl.load(DOC_FIRST + block))
        slots = DQ_SLOTS + local_head * (end_token - first_token) * P * D
        entry = (tl.minimum(tl.maximum(token, first_token), end_token - 1) - first_token) * P
        for s in tl.range(0, num_past, num_stages=STAGES):
            dq += tl.load(slots + (entry + s)[:, None] * D + dims[None, :]).to(tl.float32)
        at = head * D + token[:, None] * dq_stride_t + dims[None, :]
        tl.store(DQ + at, (dq * softmax_scale).to(DQ.dtype.element_ty), mask=inside[:, None])


@once_a_call
def _delta_launch(call: Call) -> Launch:
    grid = (-(-call.num_tokens // 64), call.num_heads)
    strides = (call.num_heads * call.head_dim, *call.grad_strides)
    return Launch(_delta_kernel, grid, call.num_tokens, *strides, D=call.head_dim, ROWS=64, warps=4)


def output_dot_gradient(call: Call, out: Tensor, d_out: Tensor) -> Tensor:
    """<out, d_out> of each query and head, fp32 `[Hq, T]`."""
    delta = torch.empty(call.num_heads, call.num_tokens, device=out.device, dtype=torch.float32)
    _delta_launch(call)(out, d_out, delta)
    return delta


@dataclass(frozen=True, kw_only=True)
class _KeysLaunches:
    """dK and dV of a group of heads. Where lists can be long, what they hold past the first `split` entries has a launch of its own."""

    most: Launch
    long: Launch | None
    """To go first."""
    split: int
    pieces: int
    """Pieces of `split` entries that `long` takes, at most."""
    sums: tuple[int, ...]
    """Shape of what `long` leaves for `most` to add up."""


@once_a_call
def _keys_launches(call: Call, heads: range) -> _KeysLaunches:
    blocks, queries = call.blocks, range(call.num_tokens)
    tile = tile_of("hopper_dk_dv" if call.on_hopper else "dk_dv", blocks.size)
    keys, tiles = tile.columns, blocks.size // tile.columns
    # The sums of long lists stay in the workspace too; and few lists are so long that it pays to cut them.
    split = max(SPLIT * max(1, call.num_past) * blocks.size * call.cut.num_ranges, _LEAST_SPLIT)
    numbers: tuple[float, ...] = (*call.strides, *call.kv_strides, *call.grad_strides, call.num_kv * call.head_dim)
    numbers += (heads.start, call.group, call.num_tokens, blocks.count, call.num_lists, call.scale, call.softmax_scale)
    sizes = {"TILES": tiles, "D": call.head_dim, "P": max(1, call.num_past), "BK": keys, "SPLIT": split, "KEEP_DQ": call.keeps_dq}

    def launch(grid: tuple[int, int], *, is_long: bool) -> Launch:
        constants = {**sizes, "LISTS": call.num_past > 0, "LONG": is_long, "INT": call.offsets}
        if call.on_hopper:
            return Launch(hopper.dk_dv_kernel, grid, *numbers, **constants, **hopper.DK_DV_WARPS[keys])
        return Launch(_dk_dv_kernel, grid, *numbers, **constants, BM=tile.rows, STAGES=tile.stages, warps=tile.warps)

    most = launch((blocks.count * tiles, len(heads) // call.group), is_long=False)
    pieces = most_pieces(call, queries, split, skip=1)
    can_be_long = call.num_past > 0 and split < min(call.num_tokens, call.most_pairs(queries))
    long = launch((pieces * tiles, 1), is_long=True) if can_be_long else None
    return _KeysLaunches(most=most, long=long, split=split, pieces=pieces, sums=(pieces * tiles, 2, keys, call.head_dim))


def keys_gradient(
    call: Call, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    dq_slots: Tensor | None, lists: Lists | None, heads: range,
) -> None:  # fmt: skip
    """Fills dk and dv `[T, Hkv, D]` for the key/value heads of `heads`, and `dq_slots` `[heads, T, P, D]` where given.

    `lists` are those of all queries.
    """
    blocks, launches = call.blocks, _keys_launches(call, heads)
    unread, no_table = lse, blocks.start  # stand for what a kernel is compiled not to read
    partial, tables = unread, (no_table,) * 5
    if lists is not None:
        tables = (lists.entries, lists.edges[0], lists.edges[-1], no_table, no_table)
        if launches.long is not None:
            items = cut_lists(call, lists, launches.pieces, launches.split, skip=1)
            partial = torch.empty(launches.sums, device=q.device, dtype=torch.float32)
            tables = (*tables[:3], items.ends, items.piece)
    slots = unread if dq_slots is None else dq_slots
    tensors = (q, k, v, d_out, lse, delta, dk, dv, partial, slots, *tables, blocks.start, blocks.length)
    if launches.long is not None:
        launches.long(*tensors)
    launches.most(*tensors)


@once_a_call
def _dq_past_launch(call: Call, heads: range, queries: range) -> tuple[Launch, int, int]:
    """The launch, the size of its pieces and how many there are at most."""
    tile = tile_of("hopper_dq" if call.on_hopper else "dq_past", call.blocks.size)
    bound = most_pieces(call, queries, tile.rows)
    numbers: tuple[float, ...] = (heads.start, call.group, call.num_tokens, queries.start, len(queries), call.blocks.count, call.num_lists)
    numbers += (call.scale,)
    sizes = {"B": call.blocks.size, "D": call.head_dim, "P": call.num_past}
    if call.on_hopper:
        programs = min(bound, num_multiprocessors(call.blocks.start.device))
        numbers = (*call.strides, *call.grad_strides, *numbers)
        return Launch(hopper.dq_past_kernel, (programs, 1), *numbers, **sizes, INT=call.offsets, warps=tile.warps), tile.rows, bound
    numbers = (*call.strides, *call.kv_strides, *call.grad_strides, *numbers)
    sizes |= {"BM": tile.rows, "INT": call.offsets, "BN": tile.columns, "STAGES": tile.stages}
    return Launch(_dq_past_kernel, (bound, 1), *numbers, **sizes, warps=tile.warps), tile.rows, bound


@once_a_call
def _dq_own_launch(call: Call, heads: range, queries: range) -> Launch:
    blocks = call.blocks
    tile = tile_of("dq_own", blocks.size)
    tiles = -(-blocks.size // tile.rows)
    first_block, last_block = blocks.of(queries.start), blocks.of(queries.stop - 1)
    return Launch(
        _dq_own_kernel, ((last_block - first_block + 1) * tiles, len(heads)), *call.strides, *call.kv_strides, *call.grad_strides,
        call.num_heads * call.head_dim, heads.start, call.group, call.num_tokens, queries.start, queries.stop, first_block, call.scale,
        call.softmax_scale, TILES=tiles, D=call.head_dim, P=call.num_past, BM=tile.rows, BN=tile.columns, INT=call.offsets,
        STAGES=tile.stages, warps=tile.warps,
    )  # fmt: skip


def queries_gradient(
    call: Call, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dq_slots: Tensor | None,
    lists: Lists | None, heads: range, queries: range,
) -> None:  # fmt: skip
    """Fills dq `[T, Hq, D]` for `heads` and a range of queries, from `dq_slots` or, where these are not given, from `lists`."""
    blocks = call.blocks
    if dq_slots is None:
        dq_slots = torch.empty(len(heads), len(queries), call.num_past, call.head_dim, device=q.device, dtype=q.dtype)
        if lists is not None:
            launch, size, bound = _dq_past_launch(call, heads, queries)
            items = cut_lists(call, lists, bound, size)
            tables = (lists.entries, lists.edges[0], lists.edges[-1], items.ends, items.piece, blocks.start)
            if call.on_hopper:
                rows = tile_of("hopper_dq", blocks.size).columns
                launch(q, describe(call, k, rows), describe(call, v, rows), d_out, lse, delta, dq_slots, *tables)
            else:
                launch(q, k, v, d_out, lse, delta, dq_slots, *tables)
    _dq_own_launch(call, heads, queries)(q, k, v, d_out, lse, delta, dq_slots, dq, blocks.start, blocks.length, blocks.doc_first)
