"""Device functions that decode and prefill share.

Prefixes: ``p_`` pointer, ``b_`` block in registers, ``m_`` mask, ``i_`` index,
``o_`` offset. Scores live in base 2 (``exp2``), so scales carry log2(e).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# What an attended tile has to hide; a tile that hides nothing loads unmasked.
NO_MASK: tl.constexpr = tl.constexpr(0)  # every row sees every key of the tile
KEY_MASK: tl.constexpr = tl.constexpr(1)  # rows agree: keys below k_end
SINK_MASK: tl.constexpr = tl.constexpr(2)  # and k <= position of the row
WINDOW_MASK: tl.constexpr = tl.constexpr(3)  # and position - k < W

# Where V lies.
APART: tl.constexpr = tl.constexpr(0)  # anywhere, with strides of its own
ALIKE: tl.constexpr = tl.constexpr(1)  # anywhere, with the strides of K
PACKED: tl.constexpr = tl.constexpr(2)  # beside K: a slot holds both, as in vLLM

# A row of the table of heads: what a KV head has of its own.
K_COLUMN: tl.constexpr = tl.constexpr(0)  # address of its K in block 0
V_COLUMN: tl.constexpr = tl.constexpr(1)
TABLE_COLUMN: tl.constexpr = tl.constexpr(2)  # address of its block table
TABLE_STRIDE_COLUMN: tl.constexpr = tl.constexpr(3)  # entries a request
SINKS_COLUMN: tl.constexpr = tl.constexpr(4)  # S
WINDOW_COLUMN: tl.constexpr = tl.constexpr(5)  # W
SLOTS_COLUMN: tl.constexpr = tl.constexpr(6)  # address of its slot mapping
HEAD_COLUMN: tl.constexpr = tl.constexpr(7)  # which KV head it is
HEAD_COLUMNS: tl.constexpr = tl.constexpr(8)


@triton.jit
def load_scale(scale, IS_TENSOR: tl.constexpr):
    """An fp32 scale given by value or as a pointer to one element."""
    if IS_TENSOR:
        return tl.load(scale).to(tl.float32)
    else:
        return scale


@triton.jit
def turn_angles(
    p_row,  # [M] pointers to the rows of the positions
    m_row,  # [M]
    o_pair,  # [N] rotary pairs
    m_pair,  # [N]
    budget,
    cs_ptr,
    stride_cs,
    num_cs_rows,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,  # N
):
    """cos, sin [M, N] of R(budget - 1) R(p)^-1; 1, 0 where masked."""
    p_cos = p_row[:, None] + o_pair[None, :]
    m = m_row[:, None] & m_pair[None, :]
    b_cos = tl.load(p_cos, mask=m, other=1.0).to(tl.float32)
    b_sin = tl.load(p_cos + HALF, mask=m, other=0.0).to(tl.float32)
    # One row serves every query: all that turn, turn to the same position.
    o_near = tl.zeros([BLOCK], dtype=tl.int32) + (budget - 1)
    p_near = cs_ptr + o_near.to(tl.int64) * stride_cs + o_pair
    m_near = m_pair & (o_near < num_cs_rows)
    b_near_cos = tl.load(p_near, mask=m_near, other=1.0).to(tl.float32)[None, :]
    b_near_sin = tl.load(p_near + HALF, mask=m_near, other=0.0).to(tl.float32)[None, :]
    b_norm = b_cos * b_cos + b_sin * b_sin
    return (
        (b_near_cos * b_cos + b_near_sin * b_sin) / b_norm,
        (b_near_sin * b_cos - b_near_cos * b_sin) / b_norm,
    )


@triton.jit
def turn_query(
    b_q,  # [M, BLOCK_D] fp32
    p_q,  # [M] pointers to the rows of b_q
    b_pos,  # [M] positions
    m_row,  # [M] rows that exist
    budget,  # S + W
    cs_ptr,  # [P, ROT] rows of cos, sin
    stride_cs,
    num_cs_rows,
    ROT: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn each row back to position ``budget - 1``, if it is past that.

    R(near) R(p)^-1 from the model's own rows; dividing by ``cos^2 + sin^2`` of
    row p inverts it exactly, so a magnitude factor cancels and so does the
    rounding of the table. A position past the table gives NaN, never a read.
    """
    HALF: tl.constexpr = ROT // 2
    o_d = tl.arange(0, BLOCK_D)
    m_turn = m_row & (b_pos >= budget)
    m_known = m_turn & (b_pos < num_cs_rows)
    p_row = cs_ptr + b_pos.to(tl.int64) * stride_cs
    if IS_NEOX:
        b_cos, b_sin = turn_angles(
            p_row,
            m_known,
            o_d % HALF,
            o_d < ROT,
            budget,
            cs_ptr,
            stride_cs,
            num_cs_rows,
            HALF,
            BLOCK_D,
        )
        o_partner = (o_d + HALF) % ROT  # the compiler sees that this is contiguous
        m_partner = m_known[:, None] & (o_d < ROT)[None, :]
        b_partner = tl.load(p_q[:, None] + o_partner[None, :], mask=m_partner, other=0)
        b_sign = tl.where(o_d < HALF, -1.0, 1.0)
        b_turned = b_q * b_cos + b_partner.to(tl.float32) * b_sign[None, :] * b_sin
    else:
        o_pair = tl.arange(0, BLOCK_D // 2)
        b_cos, b_sin = turn_angles(
            p_row,
            m_known,
            o_pair,
            o_pair < HALF,
            budget,
            cs_ptr,
            stride_cs,
            num_cs_rows,
            HALF,
            BLOCK_D // 2,
        )
        b_x, b_y = tl.split(tl.reshape(b_q, [b_q.shape[0], BLOCK_D // 2, 2]))
        b_turned = tl.join(b_x * b_cos - b_y * b_sin, b_y * b_cos + b_x * b_sin)
        b_turned = tl.reshape(b_turned, [b_q.shape[0], BLOCK_D])
    b_turned = tl.where((b_pos < num_cs_rows)[:, None], b_turned, float("nan"))
    return tl.where(m_turn[:, None] & (o_d < ROT)[None, :], b_turned, b_q)


@triton.jit
def cap_scores(b_s, soft_cap):
    """``soft_cap * tanh(b_s / soft_cap)`` without overflow."""
    b_e = tl.exp2(tl.abs(b_s) * (-2.0 * LOG2E / soft_cap))
    b_t = soft_cap * (1.0 - b_e) / (1.0 + b_e)
    return tl.where(b_s < 0, -b_t, b_t)


@triton.jit
def load_head(
    i_row,
    heads_ptr,  # int64 [HKV, HEAD_COLUMNS], read if HEADS
    k_ptr,  # [B, N, HKV, D]; if HEADS, any head's: its dtype counts
    v_ptr,
    block_table_ptr,  # int32 [R, max_blocks]
    stride_kh,
    stride_vh,
    stride_table,
    num_sink_tokens,
    window_size,
    HEADS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that divide every address in the table
):
    """A KV head: which, its K, V and block table, the table's stride, and S and W.

    A layer whose heads share cache, block table and policy passes them; one whose
    heads have their own passes their addresses, a row a head, in the order in which
    programs are to start.
    """
    if HEADS:
        p_row = heads_ptr + i_row * HEAD_COLUMNS
        p_k = tl.load(p_row + K_COLUMN).to(k_ptr.dtype)
        p_v = tl.load(p_row + V_COLUMN).to(v_ptr.dtype)
        p_k = tl.multiple_of(p_k, ALIGNMENT)
        p_v = tl.multiple_of(p_v, ALIGNMENT)
        p_table = tl.load(p_row + TABLE_COLUMN).to(block_table_ptr.dtype)
        return (
            tl.load(p_row + HEAD_COLUMN).to(tl.int32),
            p_k,
            p_v,
            p_table,
            tl.load(p_row + TABLE_STRIDE_COLUMN),
            tl.load(p_row + SINKS_COLUMN).to(tl.int32),
            tl.load(p_row + WINDOW_COLUMN).to(tl.int32),
        )
    else:
        return (
            i_row,
            k_ptr + i_row.to(tl.int64) * stride_kh,
            v_ptr + i_row.to(tl.int64) * stride_vh,
            block_table_ptr,
            tl.cast(stride_table, tl.int64),
            num_sink_tokens,
            window_size,
        )


@triton.jit
def attend_tile(
    state,  # acc [M, BLOCK_D], max [M] (base 2), sum [M]: fp32
    b_q,  # [M, BLOCK_D] in the dtype of the dot
    b_pos,  # [M] positions of the rows
    b_block,  # [BLOCK_N] int32, block ids of the keys
    o_slot,  # [BLOCK_N] slots of the keys in their blocks
    i_key,  # first key of the tile
    i_low,  # keys before it are not loaded by WINDOW_MASK, the others have none
    i_end,  # keys from here on are not loaded
    window_size,
    cache,
    scores,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAYOUT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASK: tl.constexpr,
):
    """One step of the online softmax over keys ``i_key .. i_key + BLOCK_N``.

    The maximum is taken of raw scores and scaled a row at a time; a score is scaled
    where the maximum is subtracted, by the same multiply-add. So the scale must be
    positive (``checks`` asks for it).
    """
    b_acc, b_max, b_sum = state
    _, p_k, p_v, stride_kb, stride_kn, stride_vb, stride_vn = cache
    score_scale, soft_cap = scores
    o_d = tl.arange(0, BLOCK_D)
    o_n = i_key + tl.arange(0, BLOCK_N)
    m_d = (o_d < HEAD_SIZE)[None, :]
    m_n = o_n < i_end
    if MASK == WINDOW_MASK:
        m_n = m_n & (o_n >= i_low)
    b_block = b_block.to(tl.uint32).to(tl.int64)  # never negative: cheaper to widen
    o_k = (b_block * stride_kb + o_slot * stride_kn)[:, None] + o_d[None, :]
    p_bk = p_k + o_k
    # Addresses are a third of what a tile would compute, were those of V its own.
    if LAYOUT == PACKED:
        p_bv = p_bk + HEAD_SIZE
    elif LAYOUT == ALIKE:
        p_bv = p_v + o_k
    else:
        o_v = (b_block * stride_vb + o_slot * stride_vn)[:, None] + o_d[None, :]
        p_bv = p_v + o_v
    if MASK != NO_MASK:
        b_k = tl.load(p_bk, mask=m_n[:, None] & m_d, other=0.0)
        b_v = tl.load(p_bv, mask=m_n[:, None] & m_d, other=0.0)
    elif HEAD_SIZE != BLOCK_D:
        b_k = tl.load(p_bk, mask=m_d, other=0.0)
        b_v = tl.load(p_bv, mask=m_d, other=0.0)
    else:
        b_k = tl.load(p_bk)
        b_v = tl.load(p_bv)
    b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision="ieee")
    if SOFT_CAP:
        b_s = cap_scores(b_s * score_scale, soft_cap)
        score_scale = LOG2E
    if MASK == KEY_MASK:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    elif MASK == SINK_MASK:
        m_s = m_n[None, :] & (o_n[None, :] <= b_pos[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
    elif MASK == WINDOW_MASK:
        b_distance = b_pos[:, None] - o_n[None, :]
        m_s = m_n[None, :] & (b_distance >= 0) & (b_distance < window_size)
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * score_scale)
    b_base = b_new
    if MASK != NO_MASK:
        # A row that has seen nothing yet keeps -inf; subtract 0 to stay clear of NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s * score_scale - b_base[:, None])
    b_alpha = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_acc, input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit
def find_request(
    query_start_ptr,
    first_request,
    num_requests,
    first_token,
    i_tile,
    TILE_Q: tl.constexpr,
):
    """The request that owns query tile ``i_tile``, and its first token.

    Of the requests from ``first_request`` on, whose tokens begin at ``first_token``,
    request r owns the tiles from ``(start[r] - first_token) // TILE_Q + r -
    first_request`` on: room enough for its own, whatever precedes it, and strictly
    increasing even over empty requests, so a binary search finds it without a list
    from the host.
    """
    i_low = first_request
    i_high = num_requests
    i_start = first_token
    while i_high - i_low > 1:
        i_mid = (i_low + i_high) // 2
        i_token = tl.load(query_start_ptr + i_mid)
        if (i_token - first_token) // TILE_Q + (i_mid - first_request) <= i_tile:
            i_low = i_mid
            i_start = i_token
        else:
            i_high = i_mid
    return i_low, i_start


@triton.jit
def load_block_ids(
    p_table,
    i_key,
    i_end,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK: tl.constexpr,
):
    """int32 [BLOCK_N], the blocks of keys ``i_key ..``; 0 from ``i_end`` on."""
    o_n = tl.arange(0, BLOCK_N)
    if MASK == NO_MASK:  # a tile is there whole, or not at all
        m_n = tl.zeros([BLOCK_N], dtype=tl.int32) + i_key < i_end
    else:
        m_n = i_key + o_n < i_end
    if ALIGNED and BLOCK_SIZE > BLOCK_N:  # a tile lies within one block
        i_block = tl.load(p_table + i_key // BLOCK_SIZE, mask=i_key < i_end, other=0)
        return tl.zeros([BLOCK_N], dtype=tl.int32) + i_block
    elif ALIGNED:
        p_block = p_table + i_key // BLOCK_SIZE + o_n // BLOCK_SIZE
    else:
        p_block = p_table + (i_key + o_n) // BLOCK_SIZE
    return tl.load(p_block, mask=m_n, other=0)


@triton.jit
def attend_range(
    state,  # acc [M, BLOCK_D], max [M] (base 2), sum [M]: fp32
    b_q,  # [M, BLOCK_D] in the dtype of the dot
    b_pos,  # [M] positions of the rows
    i_start,
    i_low,  # keys before it are not loaded by WINDOW_MASK, the others have none
    i_end,
    window_size,
    cache,  # the request's block table, K and V of the head, their strides
    scores,  # scale (times log2(e) unless a soft cap follows), soft cap
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # i_start is a multiple of min(BLOCK_N, BLOCK_SIZE)
    LAYOUT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASK: tl.constexpr,
):
    """The online softmax over keys ``i_start .. i_end - 1``, tile by tile.

    ``NO_MASK`` takes whole tiles. A key from ``i_end`` on is not loaded, neither its
    block id nor K nor V: what lies there (stale ids, NaN) cannot leak.

    ``ALIGNED`` is for sizes of tiles and blocks of which one divides the other: a tile
    then holds whole blocks, or lies within one, and slots need no division in the loop.

    A tile's block ids are loaded one tile ahead. Were they loaded with K and V, the
    compiler would spend the stages of its pipeline on that dependence and wait for
    K and V where they are used; so all stages go to K and V (tests/kernels_aot
    reads from the compiled loops how far ahead they are loaded).
    """
    p_table = cache[0]
    o_n = tl.arange(0, BLOCK_N)
    o_slot = o_n % BLOCK_SIZE
    b_block = load_block_ids(
        p_table, i_start, i_end, BLOCK_N, BLOCK_SIZE, ALIGNED, MASK
    )
    for i_key in range(i_start, i_end, BLOCK_N):
        b_next = load_block_ids(
            p_table, i_key + BLOCK_N, i_end, BLOCK_N, BLOCK_SIZE, ALIGNED, MASK
        )
        if ALIGNED and BLOCK_SIZE > BLOCK_N:
            o_slot = i_key % BLOCK_SIZE + o_n
        elif not ALIGNED:
            o_slot = (i_key + o_n) % BLOCK_SIZE
        state = attend_tile(
            state,
            b_q,
            b_pos,
            b_block,
            o_slot,
            i_key,
            i_low,
            i_end,
            window_size,
            cache,
            scores,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_N,
            LAYOUT,
            SOFT_CAP,
            MASK,
        )
        b_block = b_next
    return state
