"""Decode: one query token a program, its work bounded by S + W.

Grid (T, HKV, splits), static: neither the number of requests nor a sequence
length enters, so one CUDA graph serves every step. A program packs the query
heads of one KV head in a tile and walks its share of the retained tiles::

    keys   0 .. S-1 |         gap          | p-W+1 .. p
    tiles  [sink ]                          [win][win][win][w]
            turned q     never addressed         plain q

KV heads may differ in S and W (``HeadTable``): those that keep much fill all
splits, those that keep little the first few, and the rest of theirs end at once. Their
grid is (T, splits, HKV), and the table's rows begin with the heads that keep most: long
programs start first and spread over all cores, short ones fill the gaps.

Splits leave (normalised output, log-sum-exp) in the workspace; a second small
kernel merges them.
"""

import math
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
from vllm_sink_kernels.triton.head_table import HeadTable
from vllm_sink_kernels.triton.launch_config import (
    PROGRAMS_PER_CORE,
    LaunchConfig,
    num_splits,
)
from vllm_sink_kernels.triton.merge import merge_splits
from vllm_sink_kernels.triton.primitives import (
    KEY_MASK,
    LOG2E,
    attend_range,
    load_head,
    load_scale,
    turn_query,
)


@triton.jit(do_not_specialize=["num_splits"])
def sink_decode_kernel(
    q_ptr,  # [T, HQ, D]
    k_ptr,  # [B, N, HKV, D]
    v_ptr,
    block_table_ptr,  # int32 [R, max_blocks]
    heads_ptr,  # int64 [HKV, HEAD_COLUMNS], read if HEADS
    positions_ptr,  # int32 [T], -1 pads
    requests_ptr,  # int32 [T]
    cs_ptr,  # [P, ROT]
    sink_logits_ptr,  # [HQ]
    out_ptr,  # [T, HQ, D], written unless SPLIT
    part_ptr,  # fp32 [T, HQ, splits, D], written if SPLIT
    lse_ptr,  # fp32 [T, HQ, splits], base 2
    k_scale,
    v_scale,
    scale,
    soft_cap,
    num_splits,
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
    HEADS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LAYOUT: tl.constexpr,
    HEADS_SLOWEST: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,  # that a split takes if there are as many
):
    i_t = tl.program_id(0)
    if HEADS_SLOWEST:
        i_split = tl.program_id(1)
        i_row = tl.program_id(2)
    else:
        i_row = tl.program_id(1)
        i_split = tl.program_id(2)
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
    i_pos = tl.load(positions_ptr + i_t)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_h = i_h * GROUP + o_g
    m_g = o_g < GROUP
    m_gd = m_g[:, None] & (o_d < HEAD_SIZE)[None, :]
    p_o = out_ptr + i_t.to(tl.int64) * stride_ot + o_h[:, None] * stride_oh
    p_o = p_o + o_d[None, :]
    o_part = (i_t.to(tl.int64) * NUM_HEADS + o_h) * num_splits + i_split
    if i_pos < 0:
        if not SPLIT:
            b_zero = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
            tl.store(p_o, b_zero.to(out_ptr.dtype.element_ty), mask=m_gd)
        return

    # This split's share of the tiles that the query retains.
    num_sinks = tl.minimum(num_sink_tokens, i_pos + 1)
    window_start = tl.maximum(num_sink_tokens, i_pos - window_size + 1)
    num_window = tl.maximum(i_pos + 1 - window_start, 0)
    sink_tiles = tl.cdiv(num_sinks, BLOCK_N)
    tiles = sink_tiles + tl.cdiv(num_window, BLOCK_N)
    tiles_per_split = tl.maximum(tl.cdiv(tiles, num_splits), MIN_TILES)
    tile_start = i_split * tiles_per_split
    tile_end = tl.minimum(tile_start + tiles_per_split, tiles)
    if SPLIT:  # noqa: SIM102, one is for the compiler, one for the device
        # Heads with few keys leave later splits nothing: a log-sum-exp of -inf,
        # which the merge skips.
        if tile_start >= tiles:
            b_none = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
            tl.store(lse_ptr + o_part, b_none, mask=m_g)
            return

    i_request = tl.load(requests_ptr + i_t).to(tl.int64)
    p_table = p_table + i_request * stride_table
    cache = (p_table, p_k, p_v, stride_kb, stride_kn, stride_vb, stride_vn)
    score_scale = scale * load_scale(k_scale, K_SCALE_TENSOR)
    if not SOFT_CAP:
        score_scale = score_scale * LOG2E
    scores = (score_scale, soft_cap)

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
    state = (b_acc, b_max, b_sum)

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
        state = attend_range(
            state,
            b_q,
            b_pos,
            tile_start * BLOCK_N,
            0,
            tl.minimum(tile_end * BLOCK_N, num_sinks),
            window_size,
            cache,
            scores,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_N,
            BLOCK_SIZE,
            False,
            LAYOUT,
            SOFT_CAP,
            KEY_MASK,
        )
        if TURN:
            # Read again rather than kept: two queries at once spill. The policies
            # differ so that the compiler does not make one load of them.
            b_q = tl.load(p_bq, mask=m_gd, other=0.0, eviction_policy="evict_first")
    state = attend_range(
        state,
        b_q,
        b_pos,
        window_start + tl.maximum(tile_start - sink_tiles, 0) * BLOCK_N,
        0,
        tl.minimum(window_start + (tile_end - sink_tiles) * BLOCK_N, i_pos + 1),
        window_size,
        cache,
        scores,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_N,
        BLOCK_SIZE,
        False,
        LAYOUT,
        SOFT_CAP,
        KEY_MASK,
    )

    b_acc, b_max, b_sum = state
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_inv = load_scale(v_scale, V_SCALE_TENSOR) / b_sum
    b_acc = b_acc * b_inv[:, None]
    if SPLIT:
        p_part = part_ptr + o_part[:, None] * HEAD_SIZE + o_d[None, :]
        tl.store(p_part, b_acc, mask=m_gd)
        tl.store(lse_ptr + o_part, b_max + tl.log2(b_sum), mask=m_g)
    else:
        tl.store(p_o, b_acc.to(out_ptr.dtype.element_ty), mask=m_gd)


def workspace_shape(
    num_heads: int, head_size: int, busy_heads: float, num_cores: int
) -> tuple[int]:
    """Shape of the fp32 workspace of ``sink_decode``: flat, any longer one will do.

    It holds the splits' outputs [T, HQ, splits, D], then their log-sum-exps
    [T, HQ, splits]. Enough for every batch: tokens times splits are less than
    ``2 * PROGRAMS_PER_CORE * num_cores / busy_heads`` where there are splits at all
    (``num_splits``). Allocate it once for the largest layer; its contents need no
    initialisation.

    Args:
        busy_heads: KV heads, if their budgets are equal; in any case at least 1.
    """
    most = math.ceil(2 * PROGRAMS_PER_CORE * num_cores / busy_heads)
    return (most * num_heads * (head_size + 1),)


def kernel_constants(
    variant: Variant,
    config: LaunchConfig,
    is_split: bool,
    heads_slowest: bool | None = None,
) -> dict[str, Any]:
    """The compile-time arguments of ``sink_decode_kernel``."""
    if heads_slowest is None:
        heads_slowest = variant.alignment > 0
    return {
        **variant.constants(config),
        "HEADS_SLOWEST": heads_slowest,
        "NUM_HEADS": variant.num_heads,
        "SPLIT": is_split,
        "BLOCK_G": pow2(variant.group),
        "MIN_TILES": max(1, launch_config.KEYS_PER_SPLIT // config.block_n),
    }


class DecodeLauncher:
    """A layer's decode with its arguments checked: what is left is the launch.

    Args:
        heads_slowest: whether the grid's slowest axis is the heads'; by default that
            of a table of heads, so that the programs of long ones start first.
    """

    def __init__(
        self,
        args: AttentionArgs,
        config: LaunchConfig | None = None,
        heads_slowest: bool | None = None,
    ) -> None:
        if config is None:
            config = args.config(launch_config.DECODE)
            if args.k_cache.element_size() == 1:
                config = launch_config.halve_keys(config)
        variant = args.variant()
        self.num_heads, self.num_kv_heads = variant.num_heads, variant.num_kv_heads
        self.head_size = variant.head_size
        self.budgets = args.budgets
        self.num_cores = launch_config.num_cores(args.q.device)
        self.fixed = {
            is_split: {
                **args.fixed(),
                **kernel_constants(variant, config, is_split, heads_slowest),
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            }
            for is_split in (False, True)
        }

    def workspace_elements(self, num_tokens: int) -> int:
        """What a batch of ``num_tokens`` needs."""
        splits = num_splits(num_tokens, self.budgets, self.num_cores)
        if splits == 1:
            return 0
        return num_tokens * self.num_heads * splits * (self.head_size + 1)

    def __call__(
        self,
        pointers: dict[str, torch.Tensor],
        query_positions: torch.Tensor,
        query_requests: torch.Tensor,
        workspace: torch.Tensor | None,
    ) -> None:
        """Launch; ``pointers`` as ``AttentionArgs.pointers`` names them."""
        num_tokens = query_positions.shape[0]
        splits = num_splits(num_tokens, self.budgets, self.num_cores)
        part = lse = query_positions  # not used
        if splits > 1:
            assert workspace is not None
            part = workspace
            lse = part[num_tokens * self.num_heads * splits * self.head_size :]
        axes = self.num_kv_heads, splits
        if self.fixed[False]["HEADS_SLOWEST"]:
            axes = splits, self.num_kv_heads
        sink_decode_kernel[(num_tokens, *axes)](
            **pointers,
            positions_ptr=query_positions,
            requests_ptr=query_requests,
            part_ptr=part,
            lse_ptr=lse,
            num_splits=splits,
            **self.fixed[splits > 1],
        )
        if splits > 1:
            merge_splits(
                part,
                lse,
                query_positions,
                pointers["out_ptr"],
                (self.fixed[True]["stride_ot"], self.fixed[True]["stride_oh"]),
                num_heads=self.num_heads,
                head_size=self.head_size,
                num_splits=splits,
            )


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
    heads: HeadTable | None = None,
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
        query_requests: int32 [T], the row of the block table of each token
            (not read for padding).
        out: [T, HQ, D], written in place and returned.
        heads: caches, block tables, S and W of each KV head; the arguments of
            those names are not used then (``heads.k_cache`` and the like will do).
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
        heads=heads,
    )
    num_tokens = q.shape[0]
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
    launch = DecodeLauncher(args, config)
    need = launch.workspace_elements(num_tokens)
    if workspace is None:
        workspace = torch.empty(need, dtype=torch.float32, device=q.device)
    require_dtype("workspace", workspace, torch.float32)
    require(
        workspace.dim() == 1 and workspace.is_contiguous() and len(workspace) >= need,
        "workspace",
        f"contiguous, flat, of at least {need} elements",
        list(workspace.shape),
        "allocate it with workspace_shape() for the largest batch",
    )
    check_device(q, workspace=workspace)
    launch(args.pointers(), query_positions, query_requests, workspace)
    return out
