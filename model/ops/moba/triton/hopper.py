"""Matrix products on Hopper, where they run beside the arithmetic: Gluon kernels for `gate.py`, `forward.py` and `backward.py`.

Warp groups hold keys, or queries, and what they sum up for them; the other side passes by in tiles, which are copied into shared memory
ahead of their use. Products are issued without waiting; what is added up last is waited for under the next tile's first products. Triton
adds a barrier wherever an array in shared memory is written and read, at whatever index, with none between: hence the order in a loop.

Where warps of their own copy, barriers in shared memory tell when a tile is there (`full`) and when its place may be filled again (`free`,
or by what is `reached`). ptxas makes all products of a kernel wait for each other where registers do not suffice, and where a warp group
other than the first has products in flight from one turn of a loop to the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from model.ops.moba.triton.launch import TABLES

ROWS = gl.constexpr(64)
# Kernels that take pieces of lists: warps that copy queries; registers of a thread that multiplies, and of one that copies; of how many
# pieces slots are kept, since queries are copied for the next piece but one before what comes out for the last but one is stored.
QUERY_WARPS, PRODUCT_REGISTERS, QUERY_REGISTERS, SLOT_BUFFERS = gl.constexpr(2), gl.constexpr(216), gl.constexpr(72), gl.constexpr(4)
# dK and dV: warps that copy, and the registers of one of their threads.
COPY_WARPS, COPY_REGISTERS = gl.constexpr(4), gl.constexpr(24)
# By the number of keys: the warps that sum up, and the registers with which a thread of any warp begins. What the copying ones give back
# makes 240 for one that sums up where a program has a multiprocessor, 232 where two share it.
DK_DV_WARPS = {128: {"warps": 8, "registers": 168}, 64: {"warps": 4, "registers": 128}}
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@gluon.constexpr_function
def _gathered(NUM_ROWS, D, WARPS):
    """The layout of rows of D: 16 bytes of a row a thread, whose rows lie one below the other."""
    return gl.BlockedLayout([max(1, NUM_ROWS * D // (256 * WARPS)), 8], [256 // D, D // 8], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def _products(N, WARPS, ACROSS=1):
    """The layout of 16 * WARPS / ACROSS rows of ACROSS * N sums of products."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS // ACROSS, ACROSS], [16, N, 16])


@gluon.constexpr_function
def _stored(N, WARPS, ACROSS):
    """For 64 rows as `_products(N, WARPS, ACROSS)` has them: 16 bytes of a row a thread, 64 in four threads. Nothing goes from warp to warp
    on the way."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0], *([0, n] for n in (32, 64) if n < N)]
    warps = [[16, 0], [32, 0], *([0, N * n] for n in (1, 2) if n < ACROSS)]
    return gl.DistributedLinearLayout(registers, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], warps, [], [64, ACROSS * N])


@gluon.jit
def _landed():
    # All copies have come, of all threads, and products may read them.
    async_copy.wait_group(0)
    _barrier()
    fence_async_shared()


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _together(a, b):
    return a + b


@gluon.jit(do_not_specialize_on_alignment=TABLES)
def past_kernel(
    Q, K, V, SLOTS, SLOT_LSE, ENTRIES, BEGIN, END, ENDS, PIECE, START, stride_t, stride_h, kv_stride_t, kv_stride_h,
    first_head, group, first_token, range_tokens, num_blocks, num_lists, scale,
    B: gl.constexpr, D: gl.constexpr, P: gl.constexpr, SIZE: gl.constexpr, INT: gl.constexpr,
):  # fmt: skip
    """Normalised partial outputs, `[H, T, P, D]`, and their log-sum-exp of SIZE queries of one block's list, whose keys and values stay on
    chip; arguments as of `forward._past_resident_kernel`."""
    pid = gl.program_id(0)
    if pid >= gl.load(ENDS + num_lists - 1):
        return
    which = gl.load(PIECE + pid)
    list_begin = gl.load(BEGIN + which)
    count = gl.load(END + which) - list_begin
    begin = (pid - gl.load(ENDS + which) + (count + SIZE - 1) // SIZE) * SIZE
    end = gl.minimum(begin + SIZE, count)
    local_head, block = (which // num_blocks).to(gl.int64), which % num_blocks
    head = first_head + local_head
    WARPS: gl.constexpr = 4
    rows: gl.constexpr = _gathered(ROWS, D, WARPS)
    key_rows: gl.constexpr = _gathered(B, D, WARPS)
    scores: gl.constexpr = _products(B, WARPS)  # [queries, keys]
    sums: gl.constexpr = _products(D, WARPS)  # [queries, D]
    stored: gl.constexpr = _stored(D, WARPS, 1)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = Q.dtype.element_ty
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([B, D], dtype)
    k_smem = gl.allocate_shared_memory(dtype, [B, D], keys)
    v_smem = gl.allocate_shared_memory(dtype, [B, D], keys)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype))
    tokens = gl.allocate_shared_memory(gl.int32, [ROWS], flat)

    key = gl.arange(0, B, layout=gl.SliceLayout(1, key_rows))[:, None]
    kv_at = (head // group) * kv_stride_h + (gl.load(START + block) + key).to(INT) * kv_stride_t
    kv_at += gl.arange(0, D, layout=gl.SliceLayout(0, key_rows))[None, :]
    async_copy.async_copy_global_to_shared(k_smem, K + kv_at)
    async_copy.async_copy_global_to_shared(v_smem, V + kv_at)
    ENTRIES += list_begin
    Q += head * stride_h
    slot_base = (local_head * range_tokens - first_token) * P
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    row = begin + gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    score_row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores))
    stored_row = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
    stored_dims = gl.arange(0, D, layout=gl.SliceLayout(0, stored))[None, :]
    tokens.store(gl.load(ENTRIES + row, mask=row < end, other=0) // P)
    _barrier()
    at = tokens.load(gl.SliceLayout(1, rows)).to(INT)[:, None] * stride_t
    async_copy.async_copy_global_to_shared(q_smem.index(0), Q + at + dims)
    async_copy.commit_group()
    row += ROWS
    following = gl.load(ENTRIES + row, mask=row < end, other=0) // P
    for t in range((end - begin + ROWS - 1) // ROWS):
        _landed()
        zero = gl.zeros((ROWS, B), gl.float32, layout=scores)
        s = warpgroup_mma(q_smem.index(t % 2), k_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
        tokens.store(following)
        _barrier()  # the tokens are there, and the products of the tile before are done, whose buffer is filled again
        at = tokens.load(gl.SliceLayout(1, rows)).to(INT)[:, None] * stride_t
        async_copy.async_copy_global_to_shared(q_smem.index((t + 1) % 2), Q + at + dims)
        async_copy.commit_group()
        row += ROWS
        following = gl.load(ENTRIES + row, mask=row < end, other=0) // P
        entry = gl.load(ENTRIES + score_row, mask=score_row < end, other=0)
        stored_entry = gl.load(ENTRIES + stored_row, mask=stored_row < end, other=0).to(INT)[:, None]
        s = warpgroup_mma_wait(0, deps=[s])
        most = gl.reduce(s, 1, _larger) * scale
        p = gl.exp2(s * scale - most[:, None])
        total = gl.reduce(p, 1, _together)
        zero = gl.zeros((ROWS, D), gl.float32, layout=sums)
        out = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), v_smem, zero, use_acc=False, is_async=True)
        gl.store(SLOT_LSE + slot_base + entry, most + gl.log2(total), mask=score_row < end)
        shrink = gl.convert_layout(1 / total, gl.SliceLayout(1, sums))[:, None]
        out = warpgroup_mma_wait(0, deps=[out])
        out = gl.convert_layout((out * shrink).to(dtype), stored)
        gl.store(SLOTS + slot_base * D + stored_entry * D + stored_dims, out, mask=(stored_row < end)[:, None])
        score_row += ROWS
        stored_row += ROWS
    _landed()


@gluon.jit
def _copy_queries_of_pieces(
    Q, D_OUT, LSE, DELTA, ENTRIES, BEGIN, END, ENDS, PIECE, num_pieces, stride_t, stride_h, grad_stride_t, grad_stride_h, first_head,
    num_tokens, first_token, range_tokens, num_blocks, q_smem, do_smem, lse_smem, delta_smem, tokens, slots, full, free,
    P: gl.constexpr, INT: gl.constexpr, BACKWARD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    # What WARPS do for kernels that take pieces of lists: the rows of q of each piece, and the slots of their results, -1 past the end of
    # a list. BACKWARD: the output's gradient, the log-sum-exp and delta, too.
    D: gl.constexpr = q_smem.shape[2]
    rows: gl.constexpr = _gathered(ROWS, D, WARPS)
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    row = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    piece, programs = gl.program_id(0), gl.num_programs(0)
    last = piece + (num_pieces - 1) * programs
    which = gl.load(PIECE + piece)
    following = gl.load(PIECE + gl.minimum(piece + programs, last))
    list_begin, end, pieces = gl.load(BEGIN + which), gl.load(END + which), gl.load(ENDS + which)
    for i in range(num_pieces):
        local_head = (which // num_blocks).to(gl.int64)
        head = first_head + local_head
        slot_base = ((local_head * range_tokens - first_token) * P).to(gl.int32)
        at = list_begin + ((end - list_begin + 2 * ROWS - 1) // (2 * ROWS) - (pieces - piece)) * (2 * ROWS) + row
        first = gl.load(ENTRIES + at, mask=at < end, other=-1)
        second = gl.load(ENTRIES + at + ROWS, mask=at + ROWS < end, other=-1)
        which = following
        piece += programs
        following = gl.load(PIECE + gl.minimum(piece + programs, last))
        list_begin, end, pieces = gl.load(BEGIN + which), gl.load(END + which), gl.load(ENDS + which)
        for half in gl.static_range(2):
            entry, here = second if half else first, i % 2 * 2 + half
            mbarrier.wait(free.index(here), i // 2 & 1 ^ 1)
            row_token = gl.maximum(entry, 0) // P
            tokens.index(half).store(row_token)
            slots.index(i % SLOT_BUFFERS * 2 + half).store(gl.where(entry >= 0, slot_base + entry, -1))
            if BACKWARD:
                async_copy.async_copy_global_to_shared(lse_smem.index(here), LSE + head * num_tokens + row_token)
                async_copy.async_copy_global_to_shared(delta_smem.index(here), DELTA + head * num_tokens + row_token)
            _barrier()
            token = tokens.index(half).load(gl.SliceLayout(1, rows)).to(INT)[:, None]
            async_copy.async_copy_global_to_shared(q_smem.index(here), Q + head * stride_h + token * stride_t + dims)
            if BACKWARD:
                async_copy.async_copy_global_to_shared(do_smem.index(here), D_OUT + head * grad_stride_h + token * grad_stride_t + dims)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()  # products may read what this thread has copied
        _barrier()
        mbarrier.arrive(full.index(i % 2), count=1)


@gluon.jit
def _copy_blocks(
    X, START, PIECE, num_pieces, first_head, group, num_blocks, smem, full, free, TILES: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    # What one warp does for kernels that take pieces of lists: tile by tile the keys, or the values, of each piece's block.
    BN: gl.constexpr = smem.shape[1]
    D: gl.constexpr = smem.shape[2]
    piece, programs = gl.program_id(0), gl.num_programs(0)
    last = piece + (num_pieces - 1) * programs
    which = gl.load(PIECE + piece)
    start = gl.load(START + which % num_blocks)
    following = gl.load(PIECE + gl.minimum(piece + programs, last))
    n = 0  # of all pieces' tiles
    for _ in range(num_pieces):
        column = (first_head + which // num_blocks) // group * D
        next_start = gl.load(START + following % num_blocks)
        which = following
        piece += programs
        following = gl.load(PIECE + gl.minimum(piece + programs, last))
        for j in range(TILES):
            stage = n % STAGES
            mbarrier.wait(free.index(stage), n // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), BN * D * 2)
            tma.async_copy_global_to_shared(X, [start + j * BN, column], full.index(stage), smem.index(stage))
            n += 1
        start = next_start


@gluon.jit
def _scores_of(n, num_tiles, q_smem, k_smem, q_full, k_full, HALF: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr):
    # Issues the scores of the n-th tile; past the end those of the last once more, which nobody reads.
    BN: gl.constexpr = k_smem.shape[1]
    n = gl.minimum(n, num_tiles - 1)
    i, stage = n // TILES, n % STAGES
    if n % TILES == 0:
        mbarrier.wait(q_full.index(i % 2), i // 2 & 1)
    mbarrier.wait(k_full.index(stage), n // STAGES & 1)
    zero = gl.zeros((ROWS, BN), gl.float32, layout=_products(BN, 4))
    k = k_smem.index(stage).permute((1, 0))
    return warpgroup_mma(q_smem.index(i % 2 * 2 + HALF), k, zero, use_acc=False, is_async=True)


@gluon.jit
def _softmax(s, most, total, scale):
    # The exponentials of scores; row by row by how much the sums so far shrink, the maximum, and the sum.
    new_most = gl.maximum(most, gl.reduce(s, 1, _larger) * scale)
    p = gl.exp2(s * scale - new_most[:, None])
    shrink = gl.exp2(most - new_most)
    return p, shrink, new_most, total * shrink + gl.reduce(p, 1, _together)


@gluon.jit
def _attend(
    SLOTS, SLOT_LSE, num_pieces, q_smem, k_smem, v_smem, slots, barriers, scale,
    HALF: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # What a warp group does for `past_streaming_kernel`: half of the queries of each piece. While a tile's values are summed up, the
    # exponentials of the next one are computed, whose scores were issued before; so too from one piece to the next.
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    dtype: gl.constexpr = q_smem.dtype
    D: gl.constexpr = q_smem.shape[2]
    sums: gl.constexpr = _products(D, 4)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    stored: gl.constexpr = _stored(D, 4, 1)
    by_row: gl.constexpr = gl.SliceLayout(1, _products(k_smem.shape[1], 4))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, stored))[None, :]
    num_tiles = num_pieces * TILES
    none = gl.full((ROWS,), float("-inf"), gl.float32, layout=by_row)
    zero = gl.zeros((ROWS,), gl.float32, layout=by_row)
    s = warpgroup_mma_wait(0, deps=[_scores_of(0, num_tiles, q_smem, k_smem, q_full, k_full, HALF, TILES, STAGES)])
    # Such an arrival is that of each thread and waits for no copies: there are none of these threads.
    async_copy.mbarrier_arrive(k_free.index(0), increment_count=False)
    if TILES == 1:
        async_copy.mbarrier_arrive(q_free.index(HALF), increment_count=False)
    s, shrink, most, total = _softmax(s, none, zero, scale)
    p = gl.convert_layout(s.to(dtype), operand)
    out = gl.zeros((ROWS, D), gl.float32, layout=sums)
    for i in range(num_pieces):
        for j in range(TILES):
            n = i * TILES + j
            stage = n % STAGES
            out *= gl.convert_layout(shrink, gl.SliceLayout(1, sums))[:, None]
            s = _scores_of(n + 1, num_tiles, q_smem, k_smem, q_full, k_full, HALF, TILES, STAGES)
            mbarrier.wait(v_full.index(stage), n // STAGES & 1)
            out = warpgroup_mma(p, v_smem.index(stage), out, use_acc=j > 0, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            async_copy.mbarrier_arrive(k_free.index((n + 1) % STAGES), increment_count=False)
            if (n + 2) % TILES == 0:
                async_copy.mbarrier_arrive(q_free.index((n + 1) // TILES % 2 * 2 + HALF), increment_count=False)
            piece_most, piece_total = most, total
            if j + 1 == TILES:  # a new piece
                most, total = none, zero
            if scale >= 0:  # always: a branch, over which ptxas does not lift the wait for `out`
                s, shrink, most, total = _softmax(s, most, total, scale)
            out = warpgroup_mma_wait(0, deps=[out])
            async_copy.mbarrier_arrive(v_free.index(stage), increment_count=False)
            p = gl.convert_layout(s.to(dtype), operand)
            if j + 1 == TILES:
                piece_slots = slots.index(i % SLOT_BUFFERS * 2 + HALF)
                slot = piece_slots.load(by_row)
                gl.store(SLOT_LSE + slot, piece_most + gl.log2(piece_total), mask=slot >= 0)
                slot = piece_slots.load(gl.SliceLayout(1, stored))[:, None]
                partial = (out * gl.convert_layout(1 / piece_total, gl.SliceLayout(1, sums))[:, None]).to(dtype)
                gl.store(SLOTS + slot.to(gl.int64) * D + dims, gl.convert_layout(partial, stored), mask=slot >= 0)


@gluon.jit(do_not_specialize_on_alignment=TABLES)
def past_streaming_kernel(
    Q, K, V, SLOTS, SLOT_LSE, ENTRIES, BEGIN, END, ENDS, PIECE, START, stride_t, stride_h,
    first_head, group, first_token, range_tokens, num_blocks, num_lists, scale,
    B: gl.constexpr, D: gl.constexpr, P: gl.constexpr, BN: gl.constexpr, INT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Normalised partial outputs, `[H, T, P, D]`, and their log-sum-exp of 2 * ROWS queries of one block's list, by which its keys and
    values pass, BN at a time; then of the next such piece. Arguments as of `forward._past_streaming_kernel`.

    FlashAttention-3 ([arXiv 2407.08608](https://arxiv.org/abs/2407.08608), algorithm 2): each half of the queries has a warp group, other
    warps copy.
    """
    num_pieces = (gl.load(ENDS + num_lists - 1) - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    if num_pieces <= 0:
        return
    TILES: gl.constexpr = B // BN
    dtype: gl.constexpr = Q.dtype.element_ty
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [4, ROWS, D], gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype))
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], K.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], V.layout)
    tokens = gl.allocate_shared_memory(gl.int32, [2, ROWS], flat)
    slots = gl.allocate_shared_memory(gl.int32, [2 * SLOT_BUFFERS, ROWS], flat)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(q_free.index(n), count=128)
        mbarrier.init(q_free.index(n + 2), count=128)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(k_free.index(n), count=256)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(v_free.index(n), count=256)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    gl.warp_specialize(
        [
            (_attend, (SLOTS, SLOT_LSE, num_pieces, q_smem, k_smem, v_smem, slots, barriers, scale, 0, TILES, STAGES)),
            (_attend, (SLOTS, SLOT_LSE, num_pieces, q_smem, k_smem, v_smem, slots, barriers, scale, 1, TILES, STAGES)),
            (_copy_queries_of_pieces, (
                Q, Q, SLOT_LSE, SLOT_LSE, ENTRIES, BEGIN, END, ENDS, PIECE, num_pieces, stride_t, stride_h, stride_t, stride_h, first_head,
                0, first_token, range_tokens, num_blocks, q_smem, q_smem, slots, slots, tokens, slots, q_full, q_free,
                P, INT, False, QUERY_WARPS,
            )),
            (_copy_blocks, (K, START, PIECE, num_pieces, first_head, group, num_blocks, k_smem, k_full, k_free, TILES, STAGES)),
            (_copy_blocks, (V, START, PIECE, num_pieces, first_head, group, num_blocks, v_smem, v_full, v_free, TILES, STAGES)),
        ],
        [4, QUERY_WARPS, 1, 1],
        [PRODUCT_REGISTERS, QUERY_REGISTERS, QUERY_REGISTERS, QUERY_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _smaller(a, b):
    return gl.minimum(a, b)


@gluon.jit
def _copy_means(high_smem, low_smem, HIGH, LOW, first, block, D: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr):
    # Means of the blocks from `first` on, zeros from `block` on.
    rows: gl.constexpr = _gathered(BN, D, WARPS)
    mean = first + gl.arange(0, BN, layout=gl.SliceLayout(1, rows))[:, None]
    at = mean * D + gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    async_copy.async_copy_global_to_shared(high_smem, HIGH + at, mask=mean < block)
    async_copy.async_copy_global_to_shared(low_smem, LOW + at, mask=mean < block)
    async_copy.commit_group()


@gluon.jit(do_not_specialize_on_alignment=TABLES)
def gate_kernel(
    Q, HIGH, LOW, NORM, CHOSEN, START, LENGTH, DOC_FIRST, stride_t, stride_h, first_head, group, num_tokens, num_blocks,
    TILES: gl.constexpr, D: gl.constexpr, P: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The choice of P blocks, `[H, T, P]`, as `gate._gate_kernel` makes it, whose arguments these are and which says how.

    A row's scores and its slots, at least 8, lie in the same four threads, so that nothing but "does any row go on" leaves a warp.
    """
    pid = gl.num_programs(0) - 1 - gl.program_id(0)  # queries with the most past blocks first
    block, tile = pid // TILES, pid % TILES
    local_head = gl.program_id(1).to(gl.int64)
    start, length = gl.load(START + block), gl.load(LENGTH + block)
    if tile * BQ >= length:
        return
    doc_first = gl.load(DOC_FIRST + block)
    num_past = block - doc_first
    WARPS: gl.constexpr = BQ // 16
    scores: gl.constexpr = _products(BN, WARPS)  # [queries, blocks]
    slots: gl.constexpr = _products(SLOTS, WARPS)  # [queries, slots]
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, slots))[None, :]
    slot_row = tile * BQ + gl.arange(0, BQ, layout=gl.SliceLayout(1, slots))[:, None]
    out = CHOSEN + (local_head * num_tokens + start + slot_row) * P + slot
    out_mask = (slot_row < length) & (slot < P)
    if num_past <= P:
        gl.store(out, gl.where(slot < num_past, doc_first + slot, -1) + gl.zeros((BQ, SLOTS), gl.int32, layout=slots), mask=out_mask)
        return
    rows: gl.constexpr = _gathered(BQ, D, WARPS)
    row_of: gl.constexpr = gl.SliceLayout(1, scores)
    dtype: gl.constexpr = Q.dtype.element_ty
    means: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [BQ, D], gl.NVMMASharedLayout.get_default_for([BQ, D], dtype))
    high_smem = gl.allocate_shared_memory(dtype, [2, BN, D], means)
    low_smem = gl.allocate_shared_memory(dtype, [2, BN, D], means)
    head = first_head + local_head
    kv_head = head // group
    HIGH += kv_head * num_blocks * D
    LOW += kv_head * num_blocks * D
    NORM += kv_head * num_blocks
    _copy_means(high_smem.index(0), low_smem.index(0), HIGH, LOW, doc_first, block, D, BN, WARPS)
    row = tile * BQ + gl.arange(0, BQ, layout=gl.SliceLayout(1, rows))
    inside = row < length
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    q = gl.load(Q + head * stride_h + (start + row).to(gl.int64)[:, None] * stride_t + dims, mask=inside[:, None], other=0.0)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    step = gl.arange(0, 128, layout=line)
    longest = gl.zeros((128,), gl.float32, layout=line)
    for first in range(doc_first, block, 128):
        longest = gl.maximum(longest, gl.load(NORM + first + step, mask=first + step < block, other=0.0))
    wide = q.to(gl.float32)
    most = (gl.sqrt(gl.reduce(wide * wide, 1, _together)) + 2e-18) * (1.01 * gl.reduce(longest, 0, _larger))  # no score is as large
    q_smem.store(gl.where((most < float("inf"))[:, None], q, 0.0))  # a score that is not finite could outrank what marks the end
    fence_async_shared()
    exponent = gl.maximum(gl.convert_layout(most, row_of), 1e-30).to(gl.int32, bitcast=True) >> 23
    scale = ((127 + 22 + 126 - exponent) << 23).to(gl.float32, bitcast=True)[:, None]  # 2^22 over the next power of two, exactly
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, scores))[None, :]
    least_int: gl.constexpr = -2147483648
    best = gl.where(slot < P, least_int, 2147483647) + gl.zeros((BQ, SLOTS), gl.int32, layout=slots)
    kept = gl.zeros((BQ, SLOTS), gl.int32, layout=slots) - 1 - slot  # all different, always
    least = gl.reduce(best, 1, _smaller)
    now = 0
    for first in range(doc_first, block, BN):
        _landed()
        score = gl.zeros((BQ, BN), gl.float32, layout=scores)
        score = warpgroup_mma(q_smem, high_smem.index(now).permute((1, 0)), score, use_acc=False, is_async=True)
        score = warpgroup_mma(q_smem, low_smem.index(now).permute((1, 0)), score, is_async=True)
        now = 1 - now
        score = warpgroup_mma_wait(0, deps=[score])
        _barrier()  # all products of the tile before are done, whose buffers are filled again
        _copy_means(high_smem.index(now), low_smem.index(now), HIGH, LOW, first + BN, block, D, BN, WARPS)
        rounded = score * scale + gl.where(first + column < block, 12582912.0, 8388608.0)
        key = rounded.to(gl.int32, bitcast=True) * BN + (BN - 1 - column)
        more = gl.reduce((key > gl.convert_layout(least, row_of)[:, None]).to(gl.int32), 1, _together)
        top = gl.full((BQ,), 2147483647, gl.int32, layout=row_of)
        for _ in range(gl.minimum(gl.reduce(more, 0, _larger), P)):
            gap = (key - top[:, None]).to(gl.uint32, bitcast=True)
            top += gl.reduce(gap, 1, _larger).to(gl.int32, bitcast=True)
            ahead = gl.convert_layout(top, gl.SliceLayout(1, slots))
            last = gl.reduce(gl.where(best == least[:, None], kept, -SLOTS - 1), 1, _larger)  # of the least, the block that came last
            here = (kept == last[:, None]) & (ahead > least)[:, None]
            best = gl.where(here, (ahead | (BN - 1))[:, None], best)
            kept = gl.where(here, (first + BN - 1 - (ahead & (BN - 1)))[:, None], kept)
            least = gl.reduce(best, 1, _smaller)
    _landed()
    gl.store(out, kept, mask=out_mask)


@gluon.jit
def _list_of(g, lists, SPLIT: gl.constexpr, LISTS: gl.constexpr, LONG: gl.constexpr):
    # Where the entries begin that this program takes of the g-th head's list, how many they are, and how many the list has.
    first, num_blocks, piece, ENTRIES, BEGIN, END, ENDS = lists
    entries, taken, count = ENTRIES, 0, 0
    if LISTS:
        listed = first + g * num_blocks
        list_begin = gl.load(BEGIN + listed)
        count = gl.load(END + listed) - list_begin
        begin = 0
        if LONG:
            begin = (piece - gl.load(ENDS + listed) + (count + SPLIT - 1) // SPLIT) * SPLIT
        entries, taken = ENTRIES + list_begin + begin, gl.minimum(SPLIT, count - begin)
    return entries, taken, count


@gluon.jit
def _num_tiles(num_own, taken):
    return num_own + (taken + ROWS - 1) // ROWS


@gluon.jit
def _sums_at(BK: gl.constexpr, D: gl.constexpr):
    sums: gl.constexpr = _products(D, BK // 16)
    return gl.arange(0, BK, layout=gl.SliceLayout(1, sums))[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, sums))[None, :]


@gluon.jit
def _copy_entries(to, entries, t, num_own, taken, row):
    # Entries of the t-th tile of queries, if it is one of the list; a group of copies in any case.
    first = (t - num_own) * ROWS
    if (first >= 0) & (first < taken):
        async_copy.async_copy_global_to_shared(to, entries + first + row, mask=first + row < taken)
    async_copy.commit_group()


@gluon.jit
def _token_of(row, entries, t, num_own, own_row, start, length, taken, P: gl.constexpr):
    # The token of row `row` of the t-th tile, and whether there is one.
    own = t < num_own
    token = gl.where(own, start + gl.minimum(own_row + t * ROWS + row, length - 1), entries.load(row.type.layout) // P)
    return token, row < gl.where(own, length - own_row, taken + num_own * ROWS) - t * ROWS


@gluon.jit
def _copy_tiles(
    Q, D_OUT, LSE, DELTA, lists, head, heads, num_own, own_row, start, length, tiles, barriers, strides, first_head, num_tokens,
    D: gl.constexpr, P: gl.constexpr, SPLIT: gl.constexpr, LISTS: gl.constexpr, LONG: gl.constexpr, INT: gl.constexpr,
):  # fmt: skip
    # What COPY_WARPS do for `_sum_over_queries`: each head's tiles of queries, one after another, entries two tiles ahead of rows. They
    # never wait for a copy but that of entries.
    q_smem, do_smem, lse_smem, delta_smem, entry_smem = tiles
    full, reached = barriers
    STAGES: gl.constexpr = q_smem.shape[0]
    RING: gl.constexpr = entry_smem.shape[0]
    PART: gl.constexpr = 32  # rows at once: registers are few
    stride_t, stride_h, grad_stride_t, grad_stride_h = strides
    rows: gl.constexpr = _gathered(PART, D, COPY_WARPS)
    row = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [COPY_WARPS], [0]))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    n = 0  # of all heads' tiles
    for g in range(heads):
        entries, taken, _ = _list_of(g, lists, SPLIT, LISTS, LONG)
        of_head = first_head + (head + g).to(gl.int64)
        if LISTS:
            _copy_entries(entry_smem.index(n % RING), entries, 0, num_own, taken, row)
            _copy_entries(entry_smem.index((n + 1) % RING), entries, 1, num_own, taken, row)
        for t in range(_num_tiles(num_own, taken)):
            stage = n % STAGES
            # Until tile n + 1 - STAGES is reached, the one before it is read, which lies here. The first STAGES - 1 need not wait.
            mbarrier.wait(reached.index((n + 1) % STAGES), (n + 1) // STAGES & 1 ^ 1)
            if LISTS:
                _copy_entries(entry_smem.index((n + 2) % RING), entries, t + 2, num_own, taken, row)
                async_copy.wait_group(2)  # this tile's have come, and the next one's
            _barrier()
            mbarrier.arrive(full.index(stage), count=1)  # of all threads, for entries
            here = entry_smem.index(n % RING)
            for part in gl.static_range(ROWS // PART):
                part_row = part * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, rows))
                token, real = _token_of(part_row, here.slice(part * PART, PART), t, num_own, own_row, start, length, taken, P)
                at, real = token.to(INT)[:, None], real[:, None]
                from_q, from_do = Q + of_head * stride_h + dims, D_OUT + of_head * grad_stride_h + dims
                async_copy.async_copy_global_to_shared(q_smem.index(stage).slice(part * PART, PART), from_q + at * stride_t, mask=real)
                async_copy.async_copy_global_to_shared(
                    do_smem.index(stage).slice(part * PART, PART), from_do + at * grad_stride_t, mask=real
                )
            # Rows that are none become zeros, of q, d_out, their log-sum-exp and delta: a probability of 1 that meets only zeros.
            token, real = _token_of(row, here, t, num_own, own_row, start, length, taken, P)
            async_copy.async_copy_global_to_shared(lse_smem.index(stage), LSE + of_head * num_tokens + token, mask=real)
            async_copy.async_copy_global_to_shared(delta_smem.index(stage), DELTA + of_head * num_tokens + token, mask=real)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)  # of each thread, once its copies have come
            async_copy.commit_group()
            n += 1


@gluon.jit
def _sum_over_queries(
    PARTIAL, DQ_SLOTS, lists, head, heads, num_own, tile, k_smem, v_smem, ds_smem, tiles, barriers, num_tokens, scale,
    TILES: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, P: gl.constexpr, SPLIT: gl.constexpr, KEEP_DQ: gl.constexpr,
    LISTS: gl.constexpr, LONG: gl.constexpr, INT: gl.constexpr,
):  # fmt: skip
    # dK and dV of BK keys over all heads. KEEP_DQ: and what dQ of a list's queries gets from them; an own block's is computed elsewhere.
    WARPS: gl.constexpr = BK // 16
    ACROSS: gl.constexpr = WARPS // 4
    q_smem, do_smem, lse_smem, delta_smem, entry_smem = tiles
    full, reached = barriers
    STAGES: gl.constexpr = q_smem.shape[0]
    dtype: gl.constexpr = q_smem.dtype
    scores: gl.constexpr = _products(ROWS, WARPS)  # [keys, queries]
    sums: gl.constexpr = _products(D, WARPS)  # [keys, D]
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    query_sums: gl.constexpr = _products(D // ACROSS, WARPS, ACROSS)  # [queries, D]
    stored: gl.constexpr = _stored(D // ACROSS, WARPS, ACROSS)
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, stored))[None, :]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, scores))[:, None]
    query = gl.arange(0, ROWS, layout=gl.SliceLayout(0, scores))[None, :]
    dk, dv = gl.zeros((BK, D), gl.float32, layout=sums), gl.zeros((BK, D), gl.float32, layout=sums)
    n = 0  # of all heads' tiles
    _landed()  # keys and values
    for g in range(heads):
        _, taken, count = _list_of(g, lists, SPLIT, LISTS, LONG)
        slots = DQ_SLOTS + (head + g).to(gl.int64) * num_tokens * P * D
        dk, dv = warpgroup_mma_init(dk), warpgroup_mma_init(dv)
        for t in range(_num_tiles(num_own, taken)):
            stage = n % STAGES
            q, do = q_smem.index(stage), do_smem.index(stage)
            mbarrier.wait(full.index(stage), n // STAGES & 1)
            fence_async_shared()  # products may read what has been copied
            lse = lse_smem.index(stage).load(gl.SliceLayout(0, scores))
            # Only dK's product may still run, or registers would not suffice: not even that where two programs share them.
            if BK == 64:
                dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
            elif not KEEP_DQ:  # else dQ has been waited for
                dv = warpgroup_mma_wait(1, deps=[dv])
            zero = gl.zeros((BK, ROWS), gl.float32, layout=scores)
            s = warpgroup_mma(k_smem, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(v_smem, do.permute((1, 0)), zero, use_acc=False, is_async=True)
            dk, dv = warpgroup_mma_wait(2, deps=[dk, dv])
            # Such an arrival is that of each thread and waits for no copies: there are none of these threads.
            async_copy.mbarrier_arrive(reached.index(stage), increment_count=False)
            s = warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(s * scale - lse[None, :])
            if t < gl.minimum(num_own, BK // ROWS):  # tiles on the diagonal; own queries after them see all these keys
                p = gl.where(t * ROWS + query >= key, p, 0.0)
            delta = delta_smem.index(stage).load(gl.SliceLayout(0, scores))
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = (p * (dp - delta[None, :])).to(dtype)
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do, dv, is_async=True)
            if KEEP_DQ:
                ds_smem.index(n % 2).store(ds)
                fence_async_shared()
                _barrier()
                zero = gl.zeros((ROWS, D), gl.float32, layout=query_sums)
                dq = warpgroup_mma(ds_smem.index(n % 2).permute((1, 0)), k_smem, zero, use_acc=False, is_async=True)
            dk = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
            if KEEP_DQ:
                dq = warpgroup_mma_wait(1, deps=[dq])
                slot = entry_smem.index(n % entry_smem.shape[0]).load(row.type.layout).to(INT)[:, None]
                real = (t >= num_own) & (row < taken - (t - num_own) * ROWS)
                gl.store(slots + slot * D + dims, gl.convert_layout(dq.to(dtype), stored), mask=real[:, None])
            n += 1
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        if LISTS and not LONG:  # noqa: SIM102 - of a constant, then of a tensor
            if count > SPLIT:  # what the other launch has summed up over the list past its first SPLIT entries
                first, num_blocks, _, _, _, _, ENDS = lists
                pieces = (count - 1) // SPLIT
                first_piece = (gl.load(ENDS + first + g * num_blocks) - pieces).to(gl.int64)
                for nth in range(pieces):
                    partial = PARTIAL + ((first_piece + nth) * TILES + tile) * (2 * BK * D) + _sums_at(BK, D)
                    dk += gl.load(partial)
                    dv += gl.load(partial + BK * D)
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
    tile, piece = gl.program_id(0) % TILES, gl.program_id(0) // TILES
    if LONG:
        if piece >= gl.load(ENDS + num_lists - 1):
            return
        which = gl.load(PIECE + piece)
        block, head = which % num_blocks, which // num_blocks
        kv_head, heads = head // group, gl.minimum(group, 1)  # one
    else:
        block, kv_head = piece, gl.program_id(1)
        heads, head = group, kv_head * group
    start, length = gl.load(START + block), gl.load(LENGTH + block)
    if tile * BK >= length:
        return
    WARPS: gl.constexpr = BK // 16
    rows: gl.constexpr = _gathered(BK, D, WARPS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = Q.dtype.element_ty
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, D], dtype)
    # What there is room for; with 64 keys, twice on a multiprocessor.
    STAGES: gl.constexpr = 2 if BK == 64 else 3 if KEEP_DQ else 4
    k_smem = gl.allocate_shared_memory(dtype, [BK, D], keys)
    v_smem = gl.allocate_shared_memory(dtype, [BK, D], keys)
    scores: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, ROWS], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [2, BK, ROWS], scores) if KEEP_DQ else k_smem
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], queries)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], queries)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    entry_smem = gl.allocate_shared_memory(gl.int32, [STAGES + 2, ROWS], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    reached = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * COPY_WARPS + 1)
        mbarrier.init(reached.index(stage), count=32 * WARPS)

    # Keys past the end of a document repeat its last one; what comes out for them is not stored.
    key = tile * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, rows))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, rows))[None, :]
    at = (first_head // group + kv_head).to(gl.int64) * kv_stride_h + (start + gl.minimum(key, length - 1)).to(INT)[:, None] * kv_stride_t
    async_copy.async_copy_global_to_shared(k_smem, K + at + dims)
    async_copy.async_copy_global_to_shared(v_smem, V + at + dims)
    async_copy.commit_group()

    num_own = 0 if LONG else (length - tile * BK + ROWS - 1) // ROWS
    lists = (head * num_blocks + block, num_blocks, piece, ENTRIES, BEGIN, END, ENDS)
    tiles, barriers = (q_smem, do_smem, lse_smem, delta_smem, entry_smem), (full, reached)
    strides = (stride_t, stride_h, grad_stride_t, grad_stride_h)
    dk, dv = gl.warp_specialize(
        [
            (_sum_over_queries, (
                PARTIAL, DQ_SLOTS, lists, head, heads, num_own, tile, k_smem, v_smem, ds_smem, tiles, barriers, num_tokens, scale,
                TILES, BK, D, P, SPLIT, KEEP_DQ, LISTS, LONG, INT,
            )),
            (_copy_tiles, (
                Q, D_OUT, LSE, DELTA, lists, head, heads, num_own, tile * BK, start, length, tiles, barriers, strides, first_head,
                num_tokens, D, P, SPLIT, LISTS, LONG, INT,
            )),
        ],
        [COPY_WARPS],
        [COPY_REGISTERS],
    )  # fmt: skip
    if LONG:
        partial = PARTIAL + gl.program_id(0).to(gl.int64) * (2 * BK * D) + _sums_at(BK, D)
        gl.store(partial, dk)
        gl.store(partial + BK * D, dv)
    else:
        at = (first_head // group + kv_head).to(gl.int64) * D + (start + key).to(INT)[:, None] * dk_stride_t + dims
        real = (key < length)[:, None]
        gl.store(DK + at, gl.convert_layout((dk * softmax_scale).to(dtype), rows), mask=real)
        gl.store(DV + at, gl.convert_layout(dv.to(dtype), rows), mask=real)


@gluon.jit
def _products_of(n, num_tiles, q_smem, do_smem, k_smem, v_smem, q_full, k_full, v_full, HALF: gl.constexpr, TILES: gl.constexpr):
    # Issues the scores of the n-th tile, and the products of the output's gradient and values; past the end those of the last once more.
    zero = gl.zeros((ROWS, ROWS), gl.float32, layout=_products(ROWS, 4))
    n = gl.minimum(n, num_tiles - 1)
    i = n // TILES
    if n % TILES == 0:
        mbarrier.wait(q_full.index(i % 2), i // 2 & 1)
    stage = n % k_smem.shape[0]
    mbarrier.wait(k_full.index(stage), n // k_smem.shape[0] & 1)
    s = warpgroup_mma(q_smem.index(i % 2 * 2 + HALF), k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    stage = n % v_smem.shape[0]
    mbarrier.wait(v_full.index(stage), n // v_smem.shape[0] & 1)
    dp = warpgroup_mma(do_smem.index(i % 2 * 2 + HALF), v_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _dq_of_pieces(
    DQ_SLOTS, num_pieces, q_smem, do_smem, lse_smem, delta_smem, k_smem, v_smem, slots, barriers, scale,
    HALF: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    # What a warp group does for `dq_past_kernel`: half of the queries of each piece. While a tile's share of dQ is summed up, that of the
    # next is prepared, whose scores were issued before; so too from one piece to the next.
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    dtype: gl.constexpr = q_smem.dtype
    D: gl.constexpr = q_smem.shape[2]
    K_STAGES: gl.constexpr = k_smem.shape[0]
    V_STAGES: gl.constexpr = v_smem.shape[0]
    by_row: gl.constexpr = gl.SliceLayout(1, _products(ROWS, 4))
    sums: gl.constexpr = _products(D, 4)  # [queries, D]
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    stored: gl.constexpr = _stored(D, 4, 1)
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, stored))[None, :]
    num_tiles = num_pieces * TILES
    s, dp = _products_of(0, num_tiles, q_smem, do_smem, k_smem, v_smem, q_full, k_full, v_full, HALF, TILES)
    lse, delta = lse_smem.index(HALF).load(by_row), delta_smem.index(HALF).load(by_row)
    s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    # Such an arrival is that of each thread and waits for no copies: there are none of these threads.
    async_copy.mbarrier_arrive(v_free.index(0), increment_count=False)
    if TILES == 1:
        async_copy.mbarrier_arrive(q_free.index(HALF), increment_count=False)
    ds = gl.convert_layout((gl.exp2(s * scale - lse[:, None]) * (dp - delta[:, None])).to(dtype), operand)
    dq = gl.zeros((ROWS, D), gl.float32, layout=sums)
    for i in range(num_pieces):
        for j in range(TILES):
            n = i * TILES + j
            s, dp = _products_of(n + 1, num_tiles, q_smem, do_smem, k_smem, v_smem, q_full, k_full, v_full, HALF, TILES)
            dq = warpgroup_mma(ds, k_smem.index(n % K_STAGES), dq, use_acc=j > 0, is_async=True)
            piece = (n + 1) // TILES % 2 * 2 + HALF
            if j + 1 == TILES:  # a new piece
                lse, delta = lse_smem.index(piece).load(by_row), delta_smem.index(piece).load(by_row)
            s = warpgroup_mma_wait(2, deps=[s])
            if scale >= 0:  # always: a branch, over which ptxas does not lift the wait for `dp`
                s = gl.exp2(s * scale - lse[:, None])
            dp = warpgroup_mma_wait(1, deps=[dp])
            async_copy.mbarrier_arrive(v_free.index((n + 1) % V_STAGES), increment_count=False)
            if (n + 2) % TILES == 0:
                async_copy.mbarrier_arrive(q_free.index(piece), increment_count=False)
            s *= dp - delta[:, None]
            dq = warpgroup_mma_wait(0, deps=[dq])
            async_copy.mbarrier_arrive(k_free.index(n % K_STAGES), increment_count=False)
            ds = gl.convert_layout(s.to(dtype), operand)
            if j + 1 == TILES:
                slot = slots.index(i % SLOT_BUFFERS * 2 + HALF).load(gl.SliceLayout(1, stored))[:, None]
                gl.store(DQ_SLOTS + slot.to(gl.int64) * D + dims, gl.convert_layout(dq.to(dtype), stored), mask=slot >= 0)


@gluon.jit(do_not_specialize_on_alignment=TABLES)
def dq_past_kernel(
    Q, K, V, D_OUT, LSE, DELTA, DQ_SLOTS, ENTRIES, BEGIN, END, ENDS, PIECE, START, stride_t, stride_h, grad_stride_t, grad_stride_h,
    first_head, group, num_tokens, first_token, range_tokens, num_blocks, num_lists, scale,
    B: gl.constexpr, D: gl.constexpr, P: gl.constexpr, INT: gl.constexpr,
):  # fmt: skip
    """What dQ of 2 * ROWS queries of one block's list gets from its keys, into their slots `[H, T, P, D]`, while keys and values pass by;
    then of the next such piece, as `past_streaming_kernel`. Arguments as of `backward._dq_past_kernel`, K and V as tensor descriptors.
    """
    num_pieces = (gl.load(ENDS + num_lists - 1) - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    if num_pieces <= 0:
        return
    TILES: gl.constexpr = B // ROWS
    K_STAGES: gl.constexpr = 3
    V_STAGES: gl.constexpr = 2
    dtype: gl.constexpr = Q.dtype.element_ty
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [4, ROWS, D], queries)
    do_smem = gl.allocate_shared_memory(dtype, [4, ROWS, D], queries)
    lse_smem = gl.allocate_shared_memory(gl.float32, [4, ROWS], flat)
    delta_smem = gl.allocate_shared_memory(gl.float32, [4, ROWS], flat)
    k_smem = gl.allocate_shared_memory(dtype, [K_STAGES, ROWS, D], K.layout)
    v_smem = gl.allocate_shared_memory(dtype, [V_STAGES, ROWS, D], V.layout)
    tokens = gl.allocate_shared_memory(gl.int32, [2, ROWS], flat)
    slots = gl.allocate_shared_memory(gl.int32, [2 * SLOT_BUFFERS, ROWS], flat)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(q_free.index(n), count=128)
        mbarrier.init(q_free.index(n + 2), count=128)
    for n in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(k_free.index(n), count=256)
    for n in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(v_free.index(n), count=256)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    gl.warp_specialize(
        [
            (_dq_of_pieces, (
                DQ_SLOTS, num_pieces, q_smem, do_smem, lse_smem, delta_smem, k_smem, v_smem, slots, barriers, scale, 0, TILES,
            )),
            (_dq_of_pieces, (
                DQ_SLOTS, num_pieces, q_smem, do_smem, lse_smem, delta_smem, k_smem, v_smem, slots, barriers, scale, 1, TILES,
            )),
            (_copy_queries_of_pieces, (
                Q, D_OUT, LSE, DELTA, ENTRIES, BEGIN, END, ENDS, PIECE, num_pieces, stride_t, stride_h, grad_stride_t, grad_stride_h,
                first_head, num_tokens, first_token, range_tokens, num_blocks, q_smem, do_smem, lse_smem, delta_smem, tokens, slots,
                q_full, q_free, P, INT, True, QUERY_WARPS,
            )),
            (_copy_blocks, (K, START, PIECE, num_pieces, first_head, group, num_blocks, k_smem, k_full, k_free, TILES, K_STAGES)),
            (_copy_blocks, (V, START, PIECE, num_pieces, first_head, group, num_blocks, v_smem, v_full, v_free, TILES, V_STAGES)),
        ],
        [4, QUERY_WARPS, 1, 1],
        [PRODUCT_REGISTERS, QUERY_REGISTERS, QUERY_REGISTERS, QUERY_REGISTERS],
    )  # fmt: skip
