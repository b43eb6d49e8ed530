"""Prefill: chunks, whole prompts and mixed batches in one launch.

A program takes a tile of consecutive queries of one request, all heads of one KV
head's group, and walks what any of them retains::

    keys    0 .. S-1 |     gap      | first row's window .. last row's position
    tiles   [in][edge]               [edge][in][in][in][in][edge]
             turned q                 plain q

``in`` tiles are seen whole by every row and run without a mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.arguments import AttentionArgs, Pointers, Variant
from vllm_sink_kernels.triton.checks import (
    check_device,
    pow2,
    require,
    require_dtype,
    require_shape,
)
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.primitives import (
    LOG2E,
    NO_MASK,
    SINK_MASK,
    WINDOW_MASK,
    Keys,
    attend_range,
    find_queries,
    load_head,
    load_scale,
    score_scale,
)
from vllm_sink_kernels.triton.turn import turn_query


# One binary for every batch: the number of requests and where the slices of a mixed
# batch start must not select code, else serving pauses to recompile.
@triton.jit(
    do_not_specialize=["first_request", "first_token", "num_requests"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_ptr"],
)
def sink_prefill_kernel(
    q_ptr,  # [T, HQ, D]
    k_ptr,  # [B, N, HKV, D]
    v_ptr,
    block_table_ptr,  # int32 [R, max_blocks]
    heads_ptr,  # int64 [HKV, HEAD_COLUMNS], or None
    query_start_ptr,  # int32 [R + 1]
    seq_lens_ptr,  # int32 [R]
    out_ptr,  # [T, HQ, D]
    q_strides,
    k_strides,
    v_strides,
    stride_table,
    out_strides,
    scores,  # Scores
    turn,  # Turn, or None: sinks stay where they are
    policy,  # S, W
    first_request,
    first_token,
    num_requests,
    VARIANT: tl.constexpr,
    TILE_Q: tl.constexpr,  # query tokens a tile
    BLOCK_M: tl.constexpr,  # its rows, at least TILE_Q * GROUP
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,  # keys of a tile that hides some
):
    BLOCK_SIZE: tl.constexpr = VARIANT.block_size
    GROUP: tl.constexpr = VARIANT.group
    # Tiles begin at whole blocks, or at whole tiles of a larger block, unless neither
    # of the two sizes divides the other.
    INNER_ALIGNED: tl.constexpr = BLOCK_N % BLOCK_SIZE == 0 or BLOCK_SIZE % BLOCK_N == 0
    EDGE_ALIGNED: tl.constexpr = INNER_ALIGNED and (
        EDGE_N % BLOCK_SIZE == 0 or BLOCK_SIZE % EDGE_N == 0
    )
    INNER_UNIT: tl.constexpr = min(BLOCK_N, BLOCK_SIZE) if INNER_ALIGNED else 1
    EDGE_UNIT: tl.constexpr = min(EDGE_N, BLOCK_SIZE) if EDGE_ALIGNED else 1
    # Later tiles of a prompt see more keys: started first, they do not end last.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_row = tl.program_id(1)  # of the table of heads, which begins with the longest
    i_r, i_start, query_len, i_first = find_queries(
        query_start_ptr, first_request, num_requests, first_token, i_tile, TILE_Q
    )
    if i_first >= query_len:
        return
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_q = i_first + o_m // GROUP  # query of the row, within the request
    m_m = (o_m < TILE_Q * GROUP) & (o_q < query_len)
    m_md = m_m[:, None] & (o_d < VARIANT.head_size)[None, :]
    num_computed = tl.load(seq_lens_ptr + i_r) - query_len
    b_pos = num_computed + o_q
    first = num_computed + i_first
    last = num_computed + tl.minimum(i_first + TILE_Q, query_len) - 1

    o_t = (i_start + o_q).to(tl.int64)
    head = load_head(
        i_row,
        heads_ptr,
        k_ptr,
        v_ptr,
        block_table_ptr,
        stride_table,
        k_strides,
        v_strides,
        policy,
        VARIANT,
    )
    num_sink_tokens, window_size = head.num_sink_tokens, head.window_size
    o_h = head.index * GROUP + o_m % GROUP
    p_q = q_ptr + o_t * q_strides[0] + o_h * q_strides[1]
    keys = Keys(
        head.p_table + tl.cast(i_r, tl.int64) * head.stride_table,
        head.p_k,
        head.p_v,
        k_strides,
        v_strides,
        window_size,
        score_scale(scores, VARIANT),
        scores.soft_cap,
    )

    p_bq = p_q[:, None] + o_d[None, :]
    b_q = tl.load(p_bq, mask=m_md, other=0.0, eviction_policy="evict_last")
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if scores.sink_logits_ptr is not None:  # a key without a value
        b_max = tl.load(scores.sink_logits_ptr + o_h, mask=m_m, other=0.0)
        b_max = b_max.to(tl.float32) * LOG2E
        b_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    state = (b_acc, b_max, b_sum)

    if VARIANT.has_sinks:
        if turn is not None:
            # Without a branch around it: a tile that comes out of one is kept in
            # registers, in a layout of its own, and spills. Rows that do not turn
            # load nothing.
            budget = num_sink_tokens + window_size
            b_turned = b_q.to(tl.float32)
            b_turned = turn_query(b_turned, p_q, b_pos, m_m, budget, turn, VARIANT)
            b_q = b_turned.to(b_q.dtype)
        k_end = tl.minimum(num_sink_tokens, last + 1)
        inner_end = tl.minimum(num_sink_tokens, first + 1) // EDGE_N * EDGE_N
        state = attend_range(
            state,
            b_q,
            b_pos,
            0,
            0,
            inner_end,
            keys,
            VARIANT,
            EDGE_N,
            EDGE_ALIGNED,
            NO_MASK,
        )
        state = attend_range(
            state,
            b_q,
            b_pos,
            inner_end,
            0,
            k_end,
            keys,
            VARIANT,
            EDGE_N,
            EDGE_ALIGNED,
            SINK_MASK,
        )

        if turn is not None:
            # Read again rather than kept: two queries at once spill. The policies
            # differ so that the compiler does not make one load of them.
            b_q = tl.load(p_bq, mask=m_md, other=0.0, eviction_policy="evict_first")

    # The window: an edge where it starts row by row, the inside, the diagonal. What
    # alignment puts before i_low is neither loaded nor seen.
    i_low = tl.maximum(num_sink_tokens, first - window_size + 1)
    i_seen_by_last = tl.maximum(num_sink_tokens, last - window_size + 1)
    i_from = i_low // EDGE_UNIT * EDGE_UNIT
    inner_start = tl.cdiv(i_seen_by_last, INNER_UNIT) * INNER_UNIT
    inner_tiles = tl.maximum(first + 1 - inner_start, 0) // BLOCK_N
    inner_end = inner_start + inner_tiles * BLOCK_N
    for i_edge in tl.static_range(2):
        if i_edge == 1:
            state = attend_range(
                state,
                b_q,
                b_pos,
                inner_start,
                0,
                inner_end,
                keys,
                VARIANT,
                BLOCK_N,
                INNER_ALIGNED,
                NO_MASK,
            )
        state = attend_range(
            state,
            b_q,
            b_pos,
            i_from if i_edge == 0 else inner_end,
            i_low,
            tl.minimum(inner_start, last + 1) if i_edge == 0 else last + 1,
            keys,
            VARIANT,
            EDGE_N,
            EDGE_ALIGNED,
            WINDOW_MASK,
        )

    b_acc, b_max, b_sum = state
    b_inv = load_scale(scores.v_scale, VARIANT.v_scale_tensor)
    b_inv = b_inv / tl.where(b_sum == 0.0, 1.0, b_sum)
    p_o = out_ptr + o_t * out_strides[0] + o_h * out_strides[1]
    b_o = (b_acc * b_inv[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(p_o[:, None] + o_d[None, :], b_o, mask=m_md)


def kernel_constants(variant: Variant, config: LaunchConfig) -> dict[str, Any]:
    """The compile-time arguments of ``sink_prefill_kernel``."""
    block_m = max(config.block_m, int(triton.next_power_of_2(variant.group)))
    return {
        "VARIANT": variant,
        "TILE_Q": block_m // variant.group,
        "BLOCK_M": block_m,
        "BLOCK_D": pow2(variant.head_size),
        "BLOCK_N": config.block_n,
        "EDGE_N": config.edge_n or config.block_n,
    }


class PrefillLauncher:
    """A layer's prefill with its arguments checked: what is left is the launch."""

    def __init__(self, args: AttentionArgs, config: LaunchConfig | None = None) -> None:
        if config is None:
            config = args.config(launch_config.PREFILL)
            if args.k_cache.element_size() == 1:
                config = launch_config.prefill_fp8(config)
        constants = kernel_constants(args.variant(), config)
        self.num_kv_heads, self.tile_q = args.num_kv_heads, constants["TILE_Q"]
        self.fixed = {
            **args.fixed(),
            **constants,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def __call__(
        self,
        pointers: Pointers,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        num_tokens: int,
        first_request: int = 0,
        first_token: int = 0,
    ) -> None:
        """Launch; ``pointers`` as ``AttentionArgs.pointers`` names them."""
        num_requests = seq_lens.shape[0]
        # Each request may leave one tile part empty: the bound needs no device read.
        tiles = (num_tokens - first_token) // self.tile_q + num_requests - first_request
        sink_prefill_kernel[(tiles, self.num_kv_heads)](
            **pointers,
            query_start_ptr=query_start_loc,
            seq_lens_ptr=seq_lens,
            first_request=first_request,
            first_token=first_token,
            num_requests=num_requests,
            **self.fixed,
        )


def sink_prefill(
    args: AttentionArgs,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    first_request: int = 0,
    first_token: int = 0,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Attention of the queries of R requests, each of any length, into ``args.out``.

    K and V of this step are in the cache already.

    Args:
        args: the layer and its T query tokens. Of ``out`` [T, HQ, D], written and
            returned, the rows from ``query_start_loc[R]`` on belong to nobody and stay
            as they are.
        query_start_loc: int32 [R + 1], not decreasing; equal neighbours are empty
            requests, such as padding at the end of a batch.
        seq_lens: int32 [R], not read for empty requests' sake.
        first_request, first_token: earlier requests, and their tokens, are left
            alone; the host's numbers, ``first_token = query_start_loc[first_request]``.
        config: tiles; the table's by default.
    """
    num_requests, num_tokens = args.block_table.shape[0], args.q.shape[0]
    require_shape("query_start_loc", query_start_loc, "[R + 1]", num_requests + 1)
    require_shape("seq_lens", seq_lens, "[R]", num_requests)
    for name, x in (("query_start_loc", query_start_loc), ("seq_lens", seq_lens)):
        require_dtype(name, x, torch.int32)
        require(x.is_contiguous(), name, "contiguous", list(x.stride()), "copy it")
    check_device(args.q, query_start_loc=query_start_loc, seq_lens=seq_lens)
    require(
        0 <= first_request <= num_requests and 0 <= first_token <= num_tokens,
        "first_request, first_token",
        f"within the {num_requests} requests and {num_tokens} tokens",
        (first_request, first_token),
        "pass those that decode has served",
    )
    if num_tokens > first_token and num_requests > first_request:
        PrefillLauncher(args, config)(
            args.pointers(),
            query_start_loc,
            seq_lens,
            num_tokens,
            first_request,
            first_token,
        )
    return args.out
