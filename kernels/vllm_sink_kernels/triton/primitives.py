"""Device functions that decode and prefill share.

Prefixes: ``p_`` pointer, ``b_`` block in registers, ``m_`` mask, ``i_`` index,
``o_`` offset. Scores live in base 2 (``exp2``), so scales carry log2(e).

What belongs together is one argument: ``VARIANT`` is an ``arguments.Variant``, all that
selects code; a tensor's strides but the last are a tuple; so is what a layer gives once
(``Scores``, ``turn.Turn``, its policy). Absent is None. What changes from step to step
stays an argument of its own: Triton specialises numbers within a tuple, whatever
``do_not_specialize`` says, and would compile again. Where Triton wants a constant (a
shape, an argument of its own functions), a field of ``VARIANT`` is given a name as one
first: in Triton 3.6 it is a plain number.
"""

from typing import Any, NamedTuple

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


class Scores(NamedTuple):
    """How a layer makes weights of the products of queries and keys."""

    scale: Any
    soft_cap: Any  # or None
    sink_logits_ptr: Any  # [HQ], or None
    k_scale: Any  # of an fp8 cache; a number or a pointer to one, as Variant tells
    v_scale: Any


class Head(NamedTuple):
    """A KV head: where its K and V begin, its block table and its policy."""

    index: Any
    p_k: Any
    p_v: Any
    p_table: Any  # int32 [R, stride_table]
    stride_table: Any
    num_sink_tokens: Any
    window_size: Any


class Keys(NamedTuple):
    """The keys of a request in a KV head, and how its queries see them."""

    p_table: Any  # the request's row
    p_k: Any
    p_v: Any
    k_strides: Any  # block, slot
    v_strides: Any
    window_size: Any
    score_scale: Any  # times log2(e), unless a soft cap follows
    soft_cap: Any  # or None


@triton.jit
def load_scale(scale, IS_TENSOR: tl.constexpr):
    """An fp32 scale given by value or as a pointer to one element."""
    if IS_TENSOR:
        return tl.load(scale).to(tl.float32)
    else:
        return scale


@triton.jit
def score_scale(scores, VARIANT: tl.constexpr):
    """What a product is multiplied by: a logarithm in base 2, unless it is capped."""
    scale = scores.scale * load_scale(scores.k_scale, VARIANT.k_scale_tensor)
    if scores.soft_cap is None:
        scale = scale * LOG2E
    return scale


@triton.jit
def cap_scores(b_s, soft_cap):
    """``soft_cap * tanh(b_s / soft_cap)`` without overflow."""
    b_e = tl.exp2(tl.abs(b_s) * (-2.0 * LOG2E / soft_cap))
    b_t = soft_cap * (1.0 - b_e) / (1.0 + b_e)
    return tl.where(b_s < 0, -b_t, b_t)


@triton.jit
def load_head(
    i_row,
    heads_ptr,  # int64 [HKV, HEAD_COLUMNS], or None: cache and policy are shared
    k_ptr,  # [B, N, HKV, D]; with heads, any head's: its dtype counts
    v_ptr,
    block_table_ptr,  # int32 [R, max_blocks]
    stride_table,
    k_strides,  # block, slot, head
    v_strides,
    policy,  # S, W
    VARIANT: tl.constexpr,
):
    """A KV head, as ``Head``.

    A layer whose heads share cache, block table and policy passes them; one whose
    heads have their own passes their addresses, a row a head, in the order in which
    programs are to start.
    """
    ALIGNMENT: tl.constexpr = VARIANT.alignment
    if heads_ptr is not None:
        p_row = heads_ptr + i_row * HEAD_COLUMNS
        p_k = tl.load(p_row + K_COLUMN).to(k_ptr.dtype)
        p_v = tl.load(p_row + V_COLUMN).to(v_ptr.dtype)
        p_k = tl.multiple_of(p_k, ALIGNMENT)
        p_v = tl.multiple_of(p_v, ALIGNMENT)
        p_table = tl.load(p_row + TABLE_COLUMN).to(block_table_ptr.dtype)
        return Head(
            tl.load(p_row + HEAD_COLUMN).to(tl.int32),
            p_k,
            p_v,
            p_table,
            tl.load(p_row + TABLE_STRIDE_COLUMN),
            tl.load(p_row + SINKS_COLUMN).to(tl.int32),
            tl.load(p_row + WINDOW_COLUMN).to(tl.int32),
        )
    else:
        return Head(
            i_row,
            k_ptr + i_row.to(tl.int64) * k_strides[2],
            v_ptr + i_row.to(tl.int64) * v_strides[2],
            block_table_ptr,
            tl.cast(stride_table, tl.int64),
            policy[0],
            policy[1],
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
    keys,  # Keys
    VARIANT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """One step of the online softmax over keys ``i_key .. i_key + BLOCK_N``.

    The maximum is taken of raw scores and scaled a row at a time; a score is scaled
    where the maximum is subtracted, by the same multiply-add. So the scale must be
    positive (``checks`` asks for it).
    """
    HEAD_SIZE: tl.constexpr = VARIANT.head_size
    BLOCK_D: tl.constexpr = b_q.shape[1]
    b_acc, b_max, b_sum = state
    scale = keys.score_scale
    o_d = tl.arange(0, BLOCK_D)
    o_n = i_key + tl.arange(0, BLOCK_N)
    m_d = (o_d < HEAD_SIZE)[None, :]
    m_n = o_n < i_end
    if MASK == WINDOW_MASK:
        m_n = m_n & (o_n >= i_low)
    b_block = b_block.to(tl.uint32).to(tl.int64)  # never negative: cheaper to widen
    o_k = b_block * keys.k_strides[0] + o_slot * keys.k_strides[1]
    o_k = o_k[:, None] + o_d[None, :]
    p_bk = keys.p_k + o_k
    # Addresses are a third of what a tile would compute, were those of V its own.
    if VARIANT.layout == PACKED:
        p_bv = p_bk + HEAD_SIZE
    elif VARIANT.layout == ALIKE:
        p_bv = keys.p_v + o_k
    else:
        o_v = b_block * keys.v_strides[0] + o_slot * keys.v_strides[1]
        p_bv = keys.p_v + (o_v[:, None] + o_d[None, :])
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
    if keys.soft_cap is not None:
        b_s = cap_scores(b_s * scale, keys.soft_cap)
        scale = LOG2E
    if MASK == KEY_MASK:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    elif MASK == SINK_MASK:
        m_s = m_n[None, :] & (o_n[None, :] <= b_pos[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
    elif MASK == WINDOW_MASK:
        b_distance = b_pos[:, None] - o_n[None, :]
        m_s = m_n[None, :] & (b_distance >= 0) & (b_distance < keys.window_size)
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_base = b_new
    if MASK != NO_MASK:
        # A row that has seen nothing yet keeps -inf; subtract 0 to stay clear of NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s * scale - b_base[:, None])
    b_alpha = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_acc, input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit
def find_queries(
    query_start_ptr,
    first_request,
    num_requests,
    first_token,
    i_tile,
    TILE_Q: tl.constexpr,
):
    """Of query tile ``i_tile``: request, its first token and length, first query.

    Of the requests from ``first_request`` on, whose tokens begin at ``first_token``,
    request r owns the tiles from ``(start[r] - first_token) // TILE_Q + r -
    first_request`` on: room enough for its own, whatever precedes it, and strictly
    increasing even over empty requests, so a binary search finds it without a list
    from the host. A tile that nobody needs begins at or past its request's end.
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
    query_len = tl.load(query_start_ptr + i_low + 1) - i_start
    i_first = i_tile - ((i_start - first_token) // TILE_Q + i_low - first_request)
    return i_low, i_start, query_len, i_first * TILE_Q


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
    keys,  # Keys
    VARIANT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,  # i_start is a multiple of min(BLOCK_N, block size)
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
    BLOCK_SIZE: tl.constexpr = VARIANT.block_size
    o_n = tl.arange(0, BLOCK_N)
    o_slot = o_n % BLOCK_SIZE
    b_block = load_block_ids(
        keys.p_table, i_start, i_end, BLOCK_N, BLOCK_SIZE, ALIGNED, MASK
    )
    for i_key in range(i_start, i_end, BLOCK_N):
        b_next = load_block_ids(
            keys.p_table, i_key + BLOCK_N, i_end, BLOCK_N, BLOCK_SIZE, ALIGNED, MASK
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
            keys,
            VARIANT,
            BLOCK_N,
            MASK,
        )
        b_block = b_next
    return state
