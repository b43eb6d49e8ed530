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
from vllm_sink_kernels.triton.arguments import AttentionArgs, Variant
from vllm_sink_kernels.triton.checks import (
    check_device,
    require,
    require_dtype,
    require_shape,
)
from vllm_sink_kernels.triton.head_table import HeadTable
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.primitives import (
    LOG2E,
    NO_MASK,
    SINK_MASK,
    WINDOW_MASK,
    attend_range,
    find_request,
    load_head,
    load_scale,
    turn_query,
)


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
    heads_ptr,  # int64 [HKV, HEAD_COLUMNS], read if HEADS
    query_start_ptr,  # int32 [R + 1]
    seq_lens_ptr,  # int32 [R]
    cs_ptr,  # [P, ROT]
    sink_logits_ptr,  # [HQ]
    out_ptr,  # [T, HQ, D]
    k_scale,
    v_scale,
    scale,
    soft_cap,
    first_request,
    first_token,
    num_requests,
    num_sink_tokens,
    window_size,
    num_cs_rows,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_table,
    stride_cs,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROT: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    TURN: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    K_SCALE_TENSOR: tl.constexpr,
    V_SCALE_TENSOR: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE_Q: tl.constexpr,  # query tokens a tile
    BLOCK_M: tl.constexpr,  # its rows, at least TILE_Q * GROUP
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,  # keys of a tile that hides some
):
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
    i_r, i_start = find_request(
        query_start_ptr, first_request, num_requests, first_token, i_tile, TILE_Q
    )
    query_len = tl.load(query_start_ptr + i_r + 1) - i_start
    i_first = i_tile - ((i_start - first_token) // TILE_Q + i_r - first_request)
    i_first = i_first * TILE_Q
    if i_first >= query_len:
        return
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_q = i_first + o_m // GROUP  # query of the row, within the request
    m_m = (o_m < TILE_Q * GROUP) & (o_q < query_len)
    m_md = m_m[:, None] & (o_d < HEAD_SIZE)[None, :]
    num_computed = tl.load(seq_lens_ptr + i_r) - query_len
    b_pos = num_computed + o_q
    first = num_computed + i_first
    last = num_computed + tl.minimum(i_first + TILE_Q, query_len) - 1

    o_t = (i_start + o_q).to(tl.int64)
    i_h, p_k, p_v, p_table, stride_table, num_sink_tokens, window_size = load_head(
        i_row,
        heads_ptr,
        k_ptr,
        v_ptr,
        block_table_ptr,
        stride_kh,
        stride_vh,
        stride_table,
        num_sink_tokens,
        window_size,
        HEADS,
        ALIGNMENT,
    )
    o_h = i_h * GROUP + o_m % GROUP
    p_q = q_ptr + o_t * stride_qt + o_h * stride_qh
    p_table = p_table + tl.cast(i_r, tl.int64) * stride_table
    cache = (p_table, p_k, p_v, stride_kb, stride_kn, stride_vb, stride_vn)
    score_scale = scale * load_scale(k_scale, K_SCALE_TENSOR)
    if not SOFT_CAP:
        score_scale = score_scale * LOG2E
    scores = (score_scale, soft_cap)

    p_bq = p_q[:, None] + o_d[None, :]
    b_q = tl.load(p_bq, mask=m_md, other=0.0, eviction_policy="evict_last")
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if SINK_LOGITS:  # a key without a value
        b_max = tl.load(sink_logits_ptr + o_h, mask=m_m, other=0.0)
        b_max = b_max.to(tl.float32) * LOG2E
        b_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    state = (b_acc, b_max, b_sum)

    if HAS_SINKS:
        if TURN:
            # Without a branch around it: a tile that comes out of one is kept in
            # registers, in a layout of its own, and spills. Rows that do not turn
            # load nothing.
            b_q = turn_query(
                b_q.to(tl.float32),
                p_q,
                b_pos,
                m_m,
                num_sink_tokens + window_size,
                cs_ptr,
                stride_cs,
                num_cs_rows,
                ROT,
                IS_NEOX,
                BLOCK_D,
            ).to(b_q.dtype)
        k_end = tl.minimum(num_sink_tokens, last + 1)
        inner_end = tl.minimum(num_sink_tokens, first + 1) // EDGE_N * EDGE_N
        state = attend_range(
            state,
            b_q,
            b_pos,
            0,
            0,
            inner_end,
            window_size,
            cache,
            scores,
            HEAD_SIZE,
            BLOCK_D,
            EDGE_N,
            BLOCK_SIZE,
            EDGE_ALIGNED,
            LAYOUT,
            SOFT_CAP,
            NO_MASK,
        )
        state = attend_range(
            state,
            b_q,
            b_pos,
            inner_end,
            0,
            k_end,
            window_size,
            cache,
            scores,
            HEAD_SIZE,
            BLOCK_D,
            EDGE_N,
            BLOCK_SIZE,
            EDGE_ALIGNED,
            LAYOUT,
            SOFT_CAP,
            SINK_MASK,
        )

        if TURN:
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
                window_size,
                cache,
                scores,
                HEAD_SIZE,
                BLOCK_D,
                BLOCK_N,
                BLOCK_SIZE,
                INNER_ALIGNED,
                LAYOUT,
                SOFT_CAP,
                NO_MASK,
            )
        state = attend_range(
            state,
            b_q,
            b_pos,
            i_from if i_edge == 0 else inner_end,
            i_low,
            tl.minimum(inner_start, last + 1) if i_edge == 0 else last + 1,
            window_size,
            cache,
            scores,
            HEAD_SIZE,
            BLOCK_D,
            EDGE_N,
            BLOCK_SIZE,
            EDGE_ALIGNED,
            LAYOUT,
            SOFT_CAP,
            WINDOW_MASK,
        )

    b_acc, b_max, b_sum = state
    b_inv = load_scale(v_scale, V_SCALE_TENSOR) / tl.where(b_sum == 0.0, 1.0, b_sum)
    p_o = out_ptr + o_t * stride_ot + o_h * stride_oh
    b_o = (b_acc * b_inv[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(p_o[:, None] + o_d[None, :], b_o, mask=m_md)


def kernel_constants(variant: Variant, config: LaunchConfig) -> dict[str, Any]:
    """The compile-time arguments of ``sink_prefill_kernel``."""
    block_m = max(config.block_m, int(triton.next_power_of_2(variant.group)))
    return {
        **variant.constants(config),
        "TILE_Q": block_m // variant.group,
        "BLOCK_M": block_m,
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
        pointers: dict[str, torch.Tensor],
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
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    out: torch.Tensor,
    *,
    scale: float,
    num_sink_tokens: int,
    window_size: int,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    heads: HeadTable | None = None,
    first_request: int = 0,
    first_token: int = 0,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Attention of the queries of R requests, each of any length, into ``out``.

    Args:
        q, k_cache, v_cache, block_table and the keywords: as for
            ``reference.sink_attention``. The scales may be tensors of one element.
            Every position must have its row in ``cos_sin_cache``: one past the
            table gives NaN. K and V of this step are in the cache already.
        query_start_loc: int32 [R + 1], not decreasing; equal neighbours are empty
            requests, such as padding at the end of a batch.
        seq_lens: int32 [R], not read for empty requests' sake.
        max_query_len: the longest request's queries, or more; the host's number.
        out: [T, HQ, D], written in place and returned. Tokens from
            ``query_start_loc[R]`` on belong to nobody and stay as they are.
        heads: caches, block tables, S and W of each KV head; the arguments of
            those names are not used then (``heads.k_cache`` and the like will do).
        first_request, first_token: earlier requests, and their tokens, are left
            alone; the host's numbers, ``first_token = query_start_loc[first_request]``.
        config: tiles; the table's by default.
    """
    args = AttentionArgs(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        out=out,
        scale=scale,
        num_sink_tokens=num_sink_tokens,
        window_size=window_size,
        cos_sin_cache=cos_sin_cache,
        is_neox=is_neox,
        soft_cap=soft_cap,
        sink_logits=sink_logits,
        k_scale=k_scale,
        v_scale=v_scale,
        heads=heads,
    )
    num_requests = block_table.shape[0]
    require_shape("query_start_loc", query_start_loc, "[R + 1]", num_requests + 1)
    require_shape("seq_lens", seq_lens, "[R]", num_requests)
    for name, x in (("query_start_loc", query_start_loc), ("seq_lens", seq_lens)):
        require_dtype(name, x, torch.int32)
        require(x.is_contiguous(), name, "contiguous", list(x.stride()), "copy it")
    require(
        max_query_len >= 0,
        "max_query_len",
        ">= 0",
        max_query_len,
        "pass the longest query",
    )
    check_device(q, query_start_loc=query_start_loc, seq_lens=seq_lens)
    require(
        0 <= first_request <= num_requests and 0 <= first_token <= q.shape[0],
        "first_request, first_token",
        f"within the {num_requests} requests and {q.shape[0]} tokens",
        (first_request, first_token),
        "pass those that decode has served",
    )
    num_tokens = q.shape[0]
    if num_tokens == first_token or num_requests == first_request or not max_query_len:
        return out
    PrefillLauncher(args, config)(
        args.pointers(),
        query_start_loc,
        seq_lens,
        num_tokens,
        first_request,
        first_token,
    )
    return out
