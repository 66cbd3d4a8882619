"""The backward pass's matrix products on Hopper, where they run beside the arithmetic: Gluon kernels for `backward.py`.

Warp groups hold keys, or queries, and what they sum up for them; the other side passes by in tiles of 64, which are copied into shared
memory one tile ahead. Products are issued without waiting; what is added up last is waited for under the next tile's first products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from model.ops.moba.triton.launch import TABLES

ROWS = gl.constexpr(64)
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@gluon.constexpr_function
def _gathered(NUM_ROWS, D, WARPS):
    """The layout of rows of D: 16 bytes of a row a thread, whose rows lie one below the other."""
    return gl.BlockedLayout([NUM_ROWS * D // (256 * WARPS), 8], [256 // D, D // 8], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def _products(N, WARPS, ACROSS=1):
    """The layout of 16 * WARPS / ACROSS rows of ACROSS * N sums of products."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS // ACROSS, ACROSS], [16, N, 16])


@gluon.jit
def _landed(PENDING: gl.constexpr = 0):
    # All but the last PENDING groups of copies have come, of all threads, and products may read them.
    async_copy.wait_group(PENDING)
    fence_async_shared()
    _barrier()


@gluon.jit
def _code_of(t, num_own, own_row, start, length, ENTRIES, begin, end, rows):
    # What stands in row `rows` of the t-th tile of queries: first those of the own block, as -2 - token; then the list's entries; -1 past
    # the end of either.
    row = own_row + t * ROWS + rows
    i = begin + (t - num_own) * ROWS + rows
    entry = gl.load(ENTRIES + i, mask=(t >= num_own) & (i < end), other=-1)
    return gl.where(t < num_own, gl.where(row < length, -2 - start - row, -1), entry)


@gluon.jit
def _copy_queries(
    q_smem, do_smem, lse_smem, delta_smem, codes, Q, D_OUT, LSE, DELTA, stride_t, grad_stride_t,
    D: gl.constexpr, P: gl.constexpr, INT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    # Rows that are none become zeros, of q, d_out, their log-sum-exp and delta: a probability of 1 that meets only zeros.
    rows: gl.constexpr = _gathered(ROWS, D, WARPS)
    code = codes.load(gl.SliceLayout(1, rows))
    at = gl.where(code >= 0, code // P, gl.maximum(-2 - code, 0)).to(INT)[:, None]
    real = (code != -1)[:, None]
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    async_copy.async_copy_global_to_shared(q_smem, Q + at * stride_t + dims, mask=real)
    async_copy.async_copy_global_to_shared(do_smem, D_OUT + at * grad_stride_t + dims, mask=real)
    code = codes.load(gl.BlockedLayout([1], [32], [WARPS], [0]))
    at, real = gl.where(code >= 0, code // P, gl.maximum(-2 - code, 0)), code != -1
    async_copy.async_copy_global_to_shared(lse_smem, LSE + at, mask=real)
    async_copy.async_copy_global_to_shared(delta_smem, DELTA + at, mask=real)
    async_copy.commit_group()


@gluon.jit
def _store_queries(DQ_SLOTS, dq, codes, dtype: gl.constexpr, D: gl.constexpr, INT: gl.constexpr, WARPS: gl.constexpr):
    # The part of dQ that one tile of a list gets from these keys; an own block's is computed elsewhere.
    rows: gl.constexpr = _gathered(ROWS, D, WARPS)
    code = codes.load(gl.SliceLayout(1, rows))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    gl.store(DQ_SLOTS + code.to(INT)[:, None] * D + dims, gl.convert_layout(dq.to(dtype), rows), mask=(code >= 0)[:, None])


@gluon.jit
def _sum_over_queries(
    Q, D_OUT, LSE, DELTA, DQ_SLOTS, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, codes, dk, dv,
    num_own, own_row, start, length, ENTRIES, begin, end, stride_t, grad_stride_t, scale,
    BK: gl.constexpr, D: gl.constexpr, P: gl.constexpr, KEEP_DQ: gl.constexpr, INT: gl.constexpr,
):  # fmt: skip
    # dK and dV of BK keys over num_own tiles of their block's queries from own_row on, then entries begin..end of their list, of one head.
    WARPS: gl.constexpr = BK // 16
    ACROSS: gl.constexpr = WARPS // 4
    scores: gl.constexpr = _products(ROWS, WARPS)  # [keys, queries]
    sums: gl.constexpr = _products(D, WARPS)  # [keys, D]
    query_sums: gl.constexpr = _products(D // ACROSS, WARPS, ACROSS)  # [queries, D]
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, scores))[:, None]
    query = gl.arange(0, ROWS, layout=gl.SliceLayout(0, scores))[None, :]
    num_tiles = num_own + gl.maximum(end - begin + ROWS - 1, 0) // ROWS
    _barrier()  # all warps have left what these buffers held
    codes.index(0).store(_code_of(0, num_own, own_row, start, length, ENTRIES, begin, end, rows))
    codes.index(2).store(gl.full((ROWS,), -1, gl.int32, layout=rows.type.layout))
    _barrier()
    _copy_queries(
        q_smem.index(0), do_smem.index(0), lse_smem.index(0), delta_smem.index(0), codes.index(0), Q, D_OUT, LSE, DELTA, stride_t,
        grad_stride_t, D, P, INT, WARPS,
    )  # fmt: skip
    following = _code_of(1, num_own, own_row, start, length, ENTRIES, begin, end, rows)
    before, now, then = 2, 0, 1
    dk, dv = warpgroup_mma_init(dk), warpgroup_mma_init(dv)
    dq = warpgroup_mma_init(gl.zeros((ROWS, D), gl.float32, layout=query_sums))
    for t in range(num_tiles):
        q, do = q_smem.index(t % 2), do_smem.index(t % 2)
        codes.index(then).store(following)
        _landed()
        if KEEP_DQ:  # of the tile before; ptxas makes all products wait for each other where this one is read while others run
            dk, dv, dq = warpgroup_mma_wait(0, deps=[dk, dv, dq])
        zero = gl.zeros((BK, ROWS), gl.float32, layout=scores)
        s = warpgroup_mma(k_smem, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(v_smem, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        if KEEP_DQ:
            _store_queries(DQ_SLOTS, dq, codes.index(before), q.dtype, D, INT, WARPS)
        else:
            dk, dv = warpgroup_mma_wait(2, deps=[dk, dv])
        _barrier()
        _copy_queries(
            q_smem.index((t + 1) % 2), do_smem.index((t + 1) % 2), lse_smem.index((t + 1) % 2), delta_smem.index((t + 1) % 2),
            codes.index(then), Q, D_OUT, LSE, DELTA, stride_t, grad_stride_t, D, P, INT, WARPS,
        )  # fmt: skip
        following = _code_of(t + 2, num_own, own_row, start, length, ENTRIES, begin, end, rows)
        before, now, then = now, then, before
        lse = lse_smem.index(t % 2).load(gl.SliceLayout(0, scores))
        delta = delta_smem.index(t % 2).load(gl.SliceLayout(0, scores))
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale - lse[None, :])
        if t < gl.minimum(num_own, BK // ROWS):  # tiles on the diagonal; own queries after them see all these keys
            p = gl.where(t * ROWS + query >= key, p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(q.dtype), operand), do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
        if KEEP_DQ:
            ds_smem.store(ds)
            fence_async_shared()
            _barrier()
            dq = warpgroup_mma(
                ds_smem.permute((1, 0)), k_smem, gl.zeros((ROWS, D), gl.float32, layout=query_sums), use_acc=False, is_async=True
            )
    if KEEP_DQ:
        dk, dv, dq = warpgroup_mma_wait(0, deps=[dk, dv, dq])
        _landed()
        _store_queries(DQ_SLOTS, dq, codes.index(before), q_smem.dtype, D, INT, WARPS)
    else:
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        _landed()  # nobody reads or fills what the caller's conversions write over
    return dk, dv


# Where ptxas sees that a program has one head (Triton makes a constant of a number that is 1), it makes products wait for each other.
@gluon.jit(do_not_specialize=("group",), do_not_specialize_on_alignment=TABLES)
def dk_dv_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DK, DV, PARTIAL, DQ_SLOTS, ENTRIES, BEGIN, END, ENDS, PIECE, START, LENGTH,
    stride_t, stride_h, kv_stride_t, kv_stride_h, grad_stride_t, grad_stride_h, dk_stride_t,
    first_head, group, num_tokens, num_blocks, num_lists, scale, softmax_scale,
    TILES: gl.constexpr, D: gl.constexpr, P: gl.constexpr, BK: gl.constexpr, SPLIT: gl.constexpr, KEEP_DQ: gl.constexpr,
    LISTS: gl.constexpr, LONG: gl.constexpr, INT: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of BK keys, `[T, Hkv, D]`, as `backward._dk_dv_kernel`, whose arguments these are.

    LONG: what a list holds past its first SPLIT entries, SPLIT at a time, into sums that the other launch adds up in order.
    """
    tile = gl.program_id(0) % TILES
    if LONG:
        piece = gl.program_id(0) // TILES
        if piece >= gl.load(ENDS + num_lists - 1):
            return
        which = gl.load(PIECE + piece)
        block, head = which % num_blocks, which // num_blocks
        kv_head, heads = head // group, gl.minimum(group, 1)  # one
    else:
        block, kv_head = gl.program_id(0) // TILES, gl.program_id(1)
        heads, head = group, kv_head * group
    start, length = gl.load(START + block), gl.load(LENGTH + block)
    if tile * BK >= length:
        return
    WARPS: gl.constexpr = BK // 16
    rows: gl.constexpr = _gathered(BK, D, WARPS)
    sums: gl.constexpr = _products(D, WARPS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = Q.dtype.element_ty
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, D], dtype)
    k_smem = gl.allocate_shared_memory(dtype, [BK, D], keys)
    v_smem = gl.allocate_shared_memory(dtype, [BK, D], keys)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], queries)
    do_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], queries)
    ds_smem = gl.allocate_shared_memory(dtype, [BK, ROWS], gl.NVMMASharedLayout.get_default_for([BK, ROWS], dtype)) if KEEP_DQ else k_smem
    lse_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], flat)
    delta_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], flat)
    codes = gl.allocate_shared_memory(gl.int32, [3, ROWS], flat)

    # Keys past the end of a document repeat its last one; what comes out for them is not stored.
    key = tile * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, rows))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    at = (first_head // group + kv_head).to(gl.int64) * kv_stride_h + (start + gl.minimum(key, length - 1)).to(INT)[:, None] * kv_stride_t
    async_copy.async_copy_global_to_shared(k_smem, K + at + dims)
    async_copy.async_copy_global_to_shared(v_smem, V + at + dims)
    async_copy.commit_group()

    dk, dv = gl.zeros((BK, D), gl.float32, layout=sums), gl.zeros((BK, D), gl.float32, layout=sums)
    key_row = gl.arange(0, BK, layout=gl.SliceLayout(1, sums))[:, None]
    column = gl.arange(0, D, layout=gl.SliceLayout(0, sums))[None, :]
    for g in range(heads):
        begin, end, count, list_begin = 0, 0, 0, 0
        if LISTS:
            listed = (head + g) * num_blocks + block
            list_begin = gl.load(BEGIN + listed)
            count = gl.load(END + listed) - list_begin
            if LONG:
                begin = (piece - gl.load(ENDS + which) + (count + SPLIT - 1) // SPLIT) * SPLIT
                end = gl.minimum(begin + SPLIT, count)
            else:
                end = gl.minimum(SPLIT, count)
        num_own = 0 if LONG else (length - tile * BK + ROWS - 1) // ROWS
        local_head = (head + g).to(gl.int64)
        of_head = first_head + local_head
        dk, dv = _sum_over_queries(
            Q + of_head * stride_h, D_OUT + of_head * grad_stride_h, LSE + of_head * num_tokens, DELTA + of_head * num_tokens,
            DQ_SLOTS + local_head * num_tokens * P * D, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, codes, dk, dv,
            num_own, tile * BK, start, length, ENTRIES + list_begin, begin, end, stride_t, grad_stride_t, scale, BK, D, P, KEEP_DQ, INT,
        )  # fmt: skip
        if LISTS and not LONG:  # noqa: SIM102 - of a constant, then of a tensor
            if count > SPLIT:
                pieces = (count - 1) // SPLIT
                first = (gl.load(ENDS + listed) - pieces).to(gl.int64)
                for nth in range(pieces):
                    partial = PARTIAL + ((first + nth) * TILES + tile) * (2 * BK * D) + key_row * D + column
                    dk += gl.load(partial)
                    dv += gl.load(partial + BK * D)
    if LONG:
        partial = PARTIAL + gl.program_id(0).to(gl.int64) * (2 * BK * D) + key_row * D + column
        gl.store(partial, dk)
        gl.store(partial + BK * D, dv)
    else:
        at = (first_head // group + kv_head).to(gl.int64) * D + (start + key).to(INT)[:, None] * dk_stride_t + dims
        real = (key < length)[:, None]
        gl.store(DK + at, gl.convert_layout((dk * softmax_scale).to(dtype), rows), mask=real)
        gl.store(DV + at, gl.convert_layout(dv.to(dtype), rows), mask=real)


@gluon.jit(do_not_specialize_on_alignment=TABLES)
def dq_past_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DQ_SLOTS, ENTRIES, BEGIN, END, ENDS, PIECE, START,
    stride_t, stride_h, kv_stride_t, kv_stride_h, grad_stride_t, grad_stride_h,
    first_head, group, num_tokens, first_token, range_tokens, num_blocks, num_lists, scale,
    B: gl.constexpr, D: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, INT: gl.constexpr,
):  # fmt: skip
    """dQ that BM queries of one block's list, which stay in shared memory, get from its keys, into their slots `[H, T, P, D]`; arguments
    as of `backward._dq_past_kernel`."""
    pid = gl.program_id(0)
    if pid >= gl.load(ENDS + num_lists - 1):
        return
    which = gl.load(PIECE + pid)
    list_begin = gl.load(BEGIN + which)
    count = gl.load(END + which) - list_begin
    begin = (pid - gl.load(ENDS + which) + (count + BM - 1) // BM) * BM
    local_head, block = (which // num_blocks).to(gl.int64), which % num_blocks
    head = first_head + local_head
    WARPS: gl.constexpr = BM // 16
    rows: gl.constexpr = _gathered(BM, D, WARPS)
    key_rows: gl.constexpr = _gathered(ROWS, D, WARPS)
    scores: gl.constexpr = _products(ROWS, WARPS)  # [queries, keys]
    sums: gl.constexpr = _products(D, WARPS)  # [queries, D]
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    dtype: gl.constexpr = Q.dtype.element_ty
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [BM, D], queries)
    do_smem = gl.allocate_shared_memory(dtype, [BM, D], queries)
    k_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], keys)
    v_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], keys)

    row = gl.arange(0, BM, layout=gl.SliceLayout(1, rows))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    entry = gl.load(ENTRIES + list_begin + begin + row, mask=begin + row < count, other=0).to(INT)
    at = (entry // P)[:, None]
    async_copy.async_copy_global_to_shared(q_smem, Q + head * stride_h + at * stride_t + dims)
    async_copy.async_copy_global_to_shared(do_smem, D_OUT + head * grad_stride_h + at * grad_stride_t + dims)
    key = gl.arange(0, ROWS, layout=gl.SliceLayout(1, key_rows))[:, None]
    kv_at = (head // group) * kv_stride_h + (gl.load(START + block) + key).to(INT) * kv_stride_t
    kv_at += gl.arange(0, D, layout=gl.SliceLayout(0, key_rows))[None, :]
    async_copy.async_copy_global_to_shared(k_smem.index(0), K + kv_at)
    async_copy.async_copy_global_to_shared(v_smem.index(0), V + kv_at)
    async_copy.commit_group()
    score_row = gl.arange(0, BM, layout=gl.SliceLayout(1, scores))
    token = gl.load(ENTRIES + list_begin + begin + score_row, mask=begin + score_row < count, other=0) // P
    lse = gl.load(LSE + head * num_tokens + token)[:, None]
    delta = gl.load(DELTA + head * num_tokens + token)[:, None]
    dq = warpgroup_mma_init(gl.zeros((BM, D), gl.float32, layout=sums))
    for j in range(B // ROWS):
        now, then = j % 2, (j + 1) % 2
        k, v = k_smem.index(now), v_smem.index(now)
        _landed()
        zero = gl.zeros((BM, ROWS), gl.float32, layout=scores)
        s = warpgroup_mma(q_smem, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(do_smem, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(2, deps=[dq])
        _barrier()
        kv_at += ROWS * kv_stride_t
        more = (key < ROWS) & (j + 1 < B // ROWS)
        async_copy.async_copy_global_to_shared(k_smem.index(then), K + kv_at, mask=more)
        async_copy.async_copy_global_to_shared(v_smem.index(then), V + kv_at, mask=more)
        async_copy.commit_group()
        s = warpgroup_mma_wait(1, deps=[s])
        if scale >= 0:  # always: a branch, over which ptxas does not lift the wait for `dp`
            s = gl.exp2(s * scale - lse)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = s * (dp - delta)
        dq = warpgroup_mma(gl.convert_layout(ds.to(dtype), operand), k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    _landed()  # nobody reads or fills what the conversion writes over
    slots = DQ_SLOTS + (local_head * range_tokens - first_token) * P * D
    gl.store(slots + entry[:, None] * D + dims, gl.convert_layout(dq.to(dtype), rows), mask=(begin + row < count)[:, None])
