"""The step's plan for decode: which request a token belongs to, and where it is."""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit(
    do_not_specialize=["num_requests", "num_steps", "num_tokens"],
    do_not_specialize_on_alignment=["query_start_ptr", "seq_lens_ptr"],
)
def map_tokens_kernel(
    query_start_ptr,  # int32 [R + 1]
    seq_lens_ptr,  # int32 [R]
    positions_ptr,  # int32 [T]
    requests_ptr,  # int32 [T]
    num_requests,
    num_steps,
    num_tokens,
    BLOCK: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < num_tokens
    # The first request that ends after the token: never an empty one.
    b_low = tl.zeros([BLOCK], dtype=tl.int32)
    b_high = tl.zeros([BLOCK], dtype=tl.int32) + (num_requests - 1)
    for _ in range(num_steps):
        b_mid = (b_low + b_high) // 2
        m_after = tl.load(query_start_ptr + b_mid + 1) > o_t
        b_high = tl.where(m_after, b_mid, b_high)
        b_low = tl.where(m_after, b_low, tl.minimum(b_mid + 1, b_high))
    b_end = tl.load(query_start_ptr + b_low + 1)
    b_pos = tl.load(seq_lens_ptr + b_low) - b_end + o_t
    b_pos = tl.where(o_t < tl.load(query_start_ptr + num_requests), b_pos, -1)
    tl.store(positions_ptr + o_t, b_pos, mask=m_t)
    tl.store(requests_ptr + o_t, b_low, mask=m_t)


def map_tokens(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_requests: int,
    query_positions: torch.Tensor,
    query_requests: torch.Tensor,
) -> None:
    """Position and request of the first T tokens, in one launch, in place.

    Args:
        query_start_loc: int32 [R + 1] or longer; empty requests repeat their
            neighbour's start, tokens from ``query_start_loc[R]`` on are padding.
        seq_lens: int32 [R] or longer, tokens of a request, this step's included.
        num_requests: R >= 1.
        query_positions, query_requests: int32 [T], written: position -1 for padding.
    """
    num_tokens = query_positions.shape[0]
    map_tokens_kernel[(triton.cdiv(num_tokens, BLOCK),)](
        query_start_loc,
        seq_lens,
        query_positions,
        query_requests,
        num_requests,
        # Halvings after which one request of R is left.
        (num_requests - 1).bit_length(),
        num_tokens,
        BLOCK=BLOCK,
        num_warps=4,
    )
