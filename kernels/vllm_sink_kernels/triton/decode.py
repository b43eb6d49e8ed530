"""Decode: one query token a program, its work bounded by S + W.

Grid (T, HKV, splits), static: neither the number of requests nor a sequence
length enters, so one CUDA graph serves every step. A program packs the query
heads of one KV head in a tile and walks its share of the retained tiles::

    keys   0 .. S-1 |         gap          | p-W+1 .. p
    tiles  [sink ]                          [win][win][win][w]
            turned q     never addressed         plain q

Splits leave (normalised output, log-sum-exp) in the workspace; a second small
kernel merges them.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.arguments import AttentionArgs, Variant
from vllm_sink_kernels.triton.checks import (
    check_device,
    pow2,
    require,
    require_dtype,
    require_shape,
)
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.primitives import (
    KEY_MASK,
    LOG2E,
    attend_tile,
    load_scale,
    turn_query,
)


@triton.jit
def sink_decode_kernel(
    q_ptr,  # [T, HQ, D]
    k_ptr,  # [B, N, HKV, D]
    v_ptr,
    block_table_ptr,  # int32 [R, max_blocks]
    positions_ptr,  # int32 [T], -1 pads
    requests_ptr,  # int32 [T]
    cs_ptr,  # [P, ROT]
    sink_logits_ptr,  # [HQ]
    out_ptr,  # [T, HQ, D], written if SPLITS == 1
    part_ptr,  # fp32 [T, HQ, SPLITS, D], written if SPLITS > 1
    lse_ptr,  # fp32 [T, HQ, SPLITS], base 2
    k_scale,
    v_scale,
    scale,
    soft_cap,
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
    NUM_HEADS: tl.constexpr,
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
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_h = tl.program_id(1)
    i_split = tl.program_id(2)
    i_pos = tl.load(positions_ptr + i_t)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_h = i_h * GROUP + o_g
    m_g = o_g < GROUP
    m_gd = m_g[:, None] & (o_d < HEAD_SIZE)[None, :]
    p_o = out_ptr + i_t.to(tl.int64) * stride_ot + o_h[:, None] * stride_oh
    p_o = p_o + o_d[None, :]
    if i_pos < 0:
        if SPLITS == 1:
            b_zero = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
            tl.store(p_o, b_zero.to(out_ptr.dtype.element_ty), mask=m_gd)
        return

    # This split's share of the tiles that the query retains.
    num_sinks = tl.minimum(num_sink_tokens, i_pos + 1)
    window_start = tl.maximum(num_sink_tokens, i_pos - window_size + 1)
    num_window = tl.maximum(i_pos + 1 - window_start, 0)
    sink_tiles = tl.cdiv(num_sinks, BLOCK_N)
    tiles = sink_tiles + tl.cdiv(num_window, BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, SPLITS)
    tile_start = i_split * tiles_per_split
    tile_end = tl.minimum(tile_start + tiles_per_split, tiles)

    i_request = tl.load(requests_ptr + i_t).to(tl.int64)
    p_table = block_table_ptr + i_request * stride_table
    p_k = k_ptr + i_h.to(tl.int64) * stride_kh
    p_v = v_ptr + i_h.to(tl.int64) * stride_vh
    score_scale = scale * load_scale(k_scale, K_SCALE_TENSOR)
    if not SOFT_CAP:
        score_scale = score_scale * LOG2E

    p_q = q_ptr + i_t.to(tl.int64) * stride_qt + o_h * stride_qh
    p_bq = p_q[:, None] + o_d[None, :]
    b_q = tl.load(p_bq, mask=m_gd, other=0.0, eviction_policy="evict_last")
    b_pos = tl.zeros([BLOCK_G], dtype=tl.int32) + i_pos
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    if SINK_LOGITS:  # noqa: SIM102, one is for the compiler, one for the device
        # A key without a value, seen once: by the first split.
        if i_split == 0:
            b_max = tl.load(sink_logits_ptr + o_h, mask=m_g, other=0.0)
            b_max = b_max.to(tl.float32) * LOG2E
            b_sum = tl.full([BLOCK_G], 1.0, dtype=tl.float32)

    if HAS_SINKS:
        if TURN:  # rows that need no turn load nothing for it
            b_left = tl.zeros([BLOCK_G], dtype=tl.int32) + (sink_tiles - tile_start)
            b_q = turn_query(
                b_q.to(tl.float32),
                p_q,
                b_pos,
                m_g & (b_left > 0),
                num_sink_tokens + window_size,
                cs_ptr,
                stride_cs,
                num_cs_rows,
                ROT,
                IS_NEOX,
                BLOCK_D,
            ).to(b_q.dtype)
        for i_tile in range(tile_start, tl.minimum(tile_end, sink_tiles)):
            b_acc, b_max, b_sum = attend_tile(
                b_q,
                b_acc,
                b_max,
                b_sum,
                i_tile * BLOCK_N,
                num_sinks,
                b_pos,
                window_size,
                p_table,
                p_k,
                p_v,
                stride_kb,
                stride_kn,
                stride_vb,
                stride_vn,
                score_scale,
                soft_cap,
                HEAD_SIZE,
                BLOCK_D,
                BLOCK_N,
                BLOCK_SIZE,
                SOFT_CAP,
                KEY_MASK,
            )
        if TURN:
            # Read again rather than kept: two queries at once spill. The policies
            # differ so that the compiler does not make one load of them.
            b_q = tl.load(p_bq, mask=m_gd, other=0.0, eviction_policy="evict_first")
    for i_tile in range(tl.maximum(tile_start, sink_tiles), tile_end):
        b_acc, b_max, b_sum = attend_tile(
            b_q,
            b_acc,
            b_max,
            b_sum,
            window_start + (i_tile - sink_tiles) * BLOCK_N,
            i_pos + 1,
            b_pos,
            window_size,
            p_table,
            p_k,
            p_v,
            stride_kb,
            stride_kn,
            stride_vb,
            stride_vn,
            score_scale,
            soft_cap,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_N,
            BLOCK_SIZE,
            SOFT_CAP,
            KEY_MASK,
        )

    # A split without a key leaves lse = -inf (its b_max) and is not merged.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_inv = load_scale(v_scale, V_SCALE_TENSOR) / b_sum
    b_acc = b_acc * b_inv[:, None]
    if SPLITS == 1:
        tl.store(p_o, b_acc.to(out_ptr.dtype.element_ty), mask=m_gd)
    else:
        o_part = (i_t.to(tl.int64) * NUM_HEADS + o_h) * SPLITS + i_split
        p_part = part_ptr + o_part[:, None] * HEAD_SIZE + o_d[None, :]
        tl.store(p_part, b_acc, mask=m_gd)
        tl.store(lse_ptr + o_part, b_max + tl.log2(b_sum), mask=m_g)


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
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, HQ): the mean of the splits weighted by ``2^lse``."""
    i_t = tl.program_id(0)
    i_h = tl.program_id(1)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    b_pos = tl.zeros([BLOCK_S], dtype=tl.int32) + tl.load(positions_ptr + i_t)
    m_s = (o_s < SPLITS) & (b_pos >= 0)
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


def workspace_shape(
    num_tokens: int,
    num_heads: int,
    head_size: int,
    num_sink_tokens: int,
    window_size: int,
) -> tuple[int]:
    """Shape of the fp32 workspace of ``sink_decode``: flat, any longer one will do.

    It holds the splits' outputs [T, HQ, splits, D], then their log-sum-exps
    [T, HQ, splits]; nothing if S + W needs one split. Allocate once for the
    largest batch and layer; its contents need no initialisation.
    """
    splits = launch_config.num_splits(num_sink_tokens, window_size)
    if splits == 1:
        return (0,)
    return (num_tokens * num_heads * splits * (head_size + 1),)


def kernel_constants(
    variant: Variant, config: LaunchConfig, num_splits: int
) -> dict[str, Any]:
    """The compile-time arguments of ``sink_decode_kernel``."""
    return {
        **variant.constants(config),
        "NUM_HEADS": variant.num_heads,
        "SPLITS": num_splits,
        "BLOCK_G": pow2(variant.group),
    }


def sink_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_positions: torch.Tensor,
    query_requests: torch.Tensor,
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
    workspace: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Attention of each query token by itself, into ``out``.

    Args:
        q, k_cache, v_cache, block_table and the keywords: as for
            ``reference.sink_attention``. The scales may be tensors of one element.
            Every position must have its row in ``cos_sin_cache``: one past the
            table gives NaN.
        query_positions: int32 [T]; -1 marks a padding slot, whose output is zero.
        query_requests: int32 [T], the row of ``block_table`` of each token
            (not read for padding).
        out: [T, HQ, D], written in place and returned.
        workspace: fp32 of ``workspace_shape`` or more; allocated if missing.
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
    )
    num_tokens, num_heads, head_size = q.shape
    for name, x in (
        ("query_positions", query_positions),
        ("query_requests", query_requests),
    ):
        require_shape(name, x, "[T]", num_tokens)
        require_dtype(name, x, torch.int32)
        require(x.is_contiguous(), name, "contiguous", list(x.stride()), "copy it")
    check_device(q, query_positions=query_positions, query_requests=query_requests)
    if num_tokens == 0:
        return out
    (need,) = workspace_shape(
        num_tokens, num_heads, head_size, num_sink_tokens, window_size
    )
    if workspace is None:
        workspace = torch.empty(need, dtype=torch.float32, device=q.device)
    require_dtype("workspace", workspace, torch.float32)
    require(
        workspace.is_contiguous() and workspace.numel() >= need,
        "workspace",
        f"contiguous, of at least {need} elements",
        list(workspace.shape),
        "allocate it with workspace_shape() for the largest batch",
    )
    check_device(q, workspace=workspace)
    if config is None:
        config = args.config(launch_config.DECODE)
        if k_cache.element_size() == 1:
            config = launch_config.halve_keys(config)
    splits = launch_config.num_splits(num_sink_tokens, window_size)
    part = workspace.view(-1) if splits > 1 else q  # q: any address, not used
    lse = part[num_tokens * num_heads * splits * head_size :] if splits > 1 else q
    sink_decode_kernel[(num_tokens, k_cache.shape[2], splits)](
        positions_ptr=query_positions,
        requests_ptr=query_requests,
        part_ptr=part,
        lse_ptr=lse,
        **args.runtime(sink_decode_kernel),
        **kernel_constants(args.variant(), config, splits),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        merge_splits_kernel[(num_tokens, num_heads)](
            part,
            lse,
            query_positions,
            out,
            out.stride(0),
            out.stride(1),
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            SPLITS=splits,
            BLOCK_S=int(triton.next_power_of_2(splits)),
            BLOCK_D=pow2(head_size),
            num_warps=4,
        )
    return out
