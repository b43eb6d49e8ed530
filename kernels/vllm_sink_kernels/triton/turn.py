"""The sink turn: a query as it would be, were it at the last position of the budget.

Prefixes are those of :mod:`.primitives`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Turn(NamedTuple):
    """The model's table of rotations, as a kernel takes it."""

    rows_ptr: Any  # [P, rot_dim], each of cosines, then sines
    stride_row: Any
    num_rows: Any  # P


@triton.jit
def turn_angles(
    p_row,  # [M] pointers to the rows of the positions
    m_row,  # [M]
    o_pair,  # [N] rotary pairs
    m_pair,  # [N]
    budget,
    turn,  # Turn
    HALF: tl.constexpr,
):
    """cos, sin [M, N] of R(budget - 1) R(p)^-1; 1, 0 where masked."""
    p_cos = p_row[:, None] + o_pair[None, :]
    m = m_row[:, None] & m_pair[None, :]
    b_cos = tl.load(p_cos, mask=m, other=1.0).to(tl.float32)
    b_sin = tl.load(p_cos + HALF, mask=m, other=0.0).to(tl.float32)
    # One row serves every query: all that turn, turn to the same position.
    o_near = tl.zeros(o_pair.shape, dtype=tl.int32) + (budget - 1)
    p_near = turn.rows_ptr + o_near.to(tl.int64) * turn.stride_row + o_pair
    m_near = m_pair & (o_near < turn.num_rows)
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
    turn,  # Turn
    VARIANT: tl.constexpr,
):
    """Turn each row back to position ``budget - 1``, if it is past that.

    R(near) R(p)^-1 from the model's own rows; dividing by ``cos^2 + sin^2`` of
    row p inverts it exactly, so a magnitude factor cancels and so does the
    rounding of the table. A position past the table gives NaN, never a read.
    """
    ROT: tl.constexpr = VARIANT.rot_dim
    HALF: tl.constexpr = ROT // 2
    BLOCK_D: tl.constexpr = b_q.shape[1]
    o_d = tl.arange(0, BLOCK_D)
    m_turn = m_row & (b_pos >= budget)
    m_known = m_turn & (b_pos < turn.num_rows)
    p_row = turn.rows_ptr + b_pos.to(tl.int64) * turn.stride_row
    if VARIANT.is_neox:
        b_cos, b_sin = turn_angles(
            p_row, m_known, o_d % HALF, o_d < ROT, budget, turn, HALF
        )
        o_partner = (o_d + HALF) % ROT  # the compiler sees that this is contiguous
        m_partner = m_known[:, None] & (o_d < ROT)[None, :]
        b_partner = tl.load(p_q[:, None] + o_partner[None, :], mask=m_partner, other=0)
        b_sign = tl.where(o_d < HALF, -1.0, 1.0)
        b_turned = b_q * b_cos + b_partner.to(tl.float32) * b_sign[None, :] * b_sin
    else:
        o_pair = tl.arange(0, BLOCK_D // 2)
        b_cos, b_sin = turn_angles(
            p_row, m_known, o_pair, o_pair < HALF, budget, turn, HALF
        )
        b_x, b_y = tl.split(tl.reshape(b_q, [b_q.shape[0], BLOCK_D // 2, 2]))
        b_turned = tl.join(b_x * b_cos - b_y * b_sin, b_y * b_cos + b_x * b_sin)
        b_turned = tl.reshape(b_turned, [b_q.shape[0], BLOCK_D])
    b_turned = tl.where((b_pos < turn.num_rows)[:, None], b_turned, float("nan"))
    return tl.where(m_turn[:, None] & (o_d < ROT)[None, :], b_turned, b_q)
