"""Merging what decode's splits left of a query: weights are their log-sum-exps."""

import torch
import triton
import triton.language as tl

from vllm_sink_kernels.triton.checks import pow2


@triton.jit
def merge_splits_kernel(
    part_ptr,  # fp32 [T, HQ, SPLITS, D]
    lse_ptr,  # fp32 [T, HQ, SPLITS]
    positions_ptr,  # int32 [T]
    out_ptr,  # [T, HQ, D]
    stride_ot,
    stride_oh,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two
    BLOCK_D: tl.constexpr,
):
    """Grid (T, HQ): the mean of the splits weighted by ``2^lse``."""
    i_t = tl.program_id(0)
    i_h = tl.program_id(1)
    o_s = tl.arange(0, SPLITS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    m_s = (tl.zeros([SPLITS], dtype=tl.int32) + tl.load(positions_ptr + i_t)) >= 0
    o_part = (i_t.to(tl.int64) * NUM_HEADS + i_h) * SPLITS + o_s
    b_lse = tl.load(lse_ptr + o_part, mask=m_s, other=float("-inf"))
    m_s = b_lse != float("-inf")  # a NaN stays in: it must be seen
    b_lse = tl.where(m_s, b_lse, -1e30)  # weighs nothing, and padding has no key
    b_w = tl.where(m_s, tl.exp2(b_lse - tl.max(b_lse, 0)), 0.0)
    b_sum = tl.sum(b_w, 0)
    p_part = part_ptr + o_part[:, None] * HEAD_SIZE + o_d[None, :]
    b_part = tl.load(p_part, mask=m_s[:, None] & m_d[None, :], other=0.0)
    b_o = tl.sum(b_part * b_w[:, None], 0) / tl.where(b_sum == 0.0, 1.0, b_sum)
    p_o = out_ptr + i_t.to(tl.int64) * stride_ot + i_h * stride_oh + o_d
    tl.store(p_o, b_o.to(out_ptr.dtype.element_ty), mask=m_d)


def merge_splits(
    part: torch.Tensor,
    lse: torch.Tensor,
    query_positions: torch.Tensor,
    out: torch.Tensor,
    out_strides: tuple[int, int],
    *,
    num_heads: int,
    head_size: int,
    num_splits: int,
) -> None:
    """The outputs of all T queries, into ``out``; zero where the position is -1.

    Args:
        part: fp32 [T, HQ, splits, D], flat.
        lse: fp32 [T, HQ, splits], flat, base 2; -inf for a split without a key.
        query_positions: int32 [T].
        out: [T, HQ, D] or longer; its strides but the last in ``out_strides``.
        num_splits: A power of two.
    """
    merge_splits_kernel[(query_positions.shape[0], num_heads)](
        part,
        lse,
        query_positions,
        out,
        *out_strides,
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        SPLITS=num_splits,
        BLOCK_D=pow2(head_size),
        num_warps=4,
    )
