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
from vllm_sink_kernels.triton.arguments import AttentionArgs, Pointers, Variant
from vllm_sink_kernels.triton.checks import (
    check_device,
    pow2,
    require,
    require_dtype,
    require_shape,
)
from vllm_sink_kernels.triton.launch_config import (
    PROGRAMS_PER_CORE,
    LaunchConfig,
    num_splits,
)
from vllm_sink_kernels.triton.merge import merge_splits
from vllm_sink_kernels.triton.primitives import (
    KEY_MASK,
    LOG2E,
    Keys,
    attend_range,
    load_head,
    load_scale,
    score_scale,
)
from vllm_sink_kernels.triton.turn import turn_query


@triton.jit(do_not_specialize=["num_splits"])
def sink_decode_kernel(
    q_ptr,  # [T, HQ, D]
    k_ptr,  # [B, N, HKV, D]
    v_ptr,
    block_table_ptr,  # int32 [R, max_blocks]
    heads_ptr,  # int64 [HKV, HEAD_COLUMNS], or None
    positions_ptr,  # int32 [T], -1 pads
    requests_ptr,  # int32 [T]
    out_ptr,  # [T, HQ, D], written without splits
    part_ptr,  # fp32 [T, HQ, splits, D], written with splits, or None
    lse_ptr,  # fp32 [T, HQ, splits], base 2, likewise
    q_strides,
    k_strides,
    v_strides,
    stride_table,
    out_strides,
    scores,  # Scores
    turn,  # Turn, or None: sinks stay where they are
    policy,  # S, W
    num_splits,
    VARIANT: tl.constexpr,
    HEADS_SLOWEST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,  # that a split takes if there are as many
):
    GROUP: tl.constexpr = VARIANT.group
    HEAD_SIZE: tl.constexpr = VARIANT.head_size
    SPLIT: tl.constexpr = part_ptr is not None
    i_t = tl.program_id(0)
    if HEADS_SLOWEST:
        i_split = tl.program_id(1)
        i_row = tl.program_id(2)
    else:
        i_row = tl.program_id(1)
        i_split = tl.program_id(2)
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
    i_pos = tl.load(positions_ptr + i_t)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_h = head.index * GROUP + o_g
    m_g = o_g < GROUP
    m_gd = m_g[:, None] & (o_d < HEAD_SIZE)[None, :]
    p_o = out_ptr + i_t.to(tl.int64) * out_strides[0]
    p_o = p_o + o_h[:, None] * out_strides[1] + o_d[None, :]
    o_part = (i_t.to(tl.int64) * VARIANT.num_heads + o_h) * num_splits + i_split
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
    keys = Keys(
        head.p_table + i_request * head.stride_table,
        head.p_k,
        head.p_v,
        k_strides,
        v_strides,
        window_size,
        score_scale(scores, VARIANT),
        scores.soft_cap,
    )

    p_q = q_ptr + i_t.to(tl.int64) * q_strides[0] + o_h * q_strides[1]
    p_bq = p_q[:, None] + o_d[None, :]
    b_q = tl.load(p_bq, mask=m_gd, other=0.0, eviction_policy="evict_last")
    b_pos = tl.zeros([BLOCK_G], dtype=tl.int32) + i_pos
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    # A key without a value, seen once: by the first split.
    if scores.sink_logits_ptr is not None:  # noqa: SIM102, for the compiler
        if i_split == 0:  # for the device
            b_max = tl.load(scores.sink_logits_ptr + o_h, mask=m_g, other=0.0)
            b_max = b_max.to(tl.float32) * LOG2E
            b_sum = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
    state = (b_acc, b_max, b_sum)

    if VARIANT.has_sinks:
        if turn is not None:  # rows that need no turn load nothing for it
            b_left = tl.zeros([BLOCK_G], dtype=tl.int32) + (sink_tiles - tile_start)
            m_turn = m_g & (b_left > 0)
            budget = num_sink_tokens + window_size
            b_turned = b_q.to(tl.float32)
            b_turned = turn_query(b_turned, p_q, b_pos, m_turn, budget, turn, VARIANT)
            b_q = b_turned.to(b_q.dtype)
        state = attend_range(
            state,
            b_q,
            b_pos,
            tile_start * BLOCK_N,
            0,
            tl.minimum(tile_end * BLOCK_N, num_sinks),
            keys,
            VARIANT,
            BLOCK_N,
            False,
            KEY_MASK,
        )
        if turn is not None:
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
        keys,
        VARIANT,
        BLOCK_N,
        False,
        KEY_MASK,
    )

    b_acc, b_max, b_sum = state
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_inv = load_scale(scores.v_scale, VARIANT.v_scale_tensor) / b_sum
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
    variant: Variant, config: LaunchConfig, heads_slowest: bool | None = None
) -> dict[str, Any]:
    """The compile-time arguments of ``sink_decode_kernel``."""
    if heads_slowest is None:
        heads_slowest = variant.alignment > 0
    return {
        "VARIANT": variant,
        "HEADS_SLOWEST": heads_slowest,
        "BLOCK_G": pow2(variant.group),
        "BLOCK_D": pow2(variant.head_size),
        "BLOCK_N": config.block_n,
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
        self.num_heads, self.num_kv_heads = variant.num_heads, args.num_kv_heads
        self.head_size = variant.head_size
        self.budgets = args.budgets
        self.num_cores = launch_config.num_cores(args.q.device)
        self.fixed = {
            **args.fixed(),
            **kernel_constants(variant, config, heads_slowest),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def workspace_elements(self, num_tokens: int) -> int:
        """What a batch of ``num_tokens`` needs."""
        splits = num_splits(num_tokens, self.budgets, self.num_cores)
        if splits == 1:
            return 0
        return num_tokens * self.num_heads * splits * (self.head_size + 1)

    def __call__(
        self,
        pointers: Pointers,
        query_positions: torch.Tensor,
        query_requests: torch.Tensor,
        workspace: torch.Tensor | None,
    ) -> None:
        """Launch; ``pointers`` as ``AttentionArgs.pointers`` names them."""
        num_tokens = query_positions.shape[0]
        splits = num_splits(num_tokens, self.budgets, self.num_cores)
        part = lse = None
        if splits > 1:
            assert workspace is not None
            part = workspace
            lse = part[num_tokens * self.num_heads * splits * self.head_size :]
        axes = self.num_kv_heads, splits
        if self.fixed["HEADS_SLOWEST"]:
            axes = splits, self.num_kv_heads
        sink_decode_kernel[(num_tokens, *axes)](
            **pointers,
            positions_ptr=query_positions,
            requests_ptr=query_requests,
            part_ptr=part,
            lse_ptr=lse,
            num_splits=splits,
            **self.fixed,
        )
        if part is not None and lse is not None:
            merge_splits(
                part,
                lse,
                query_positions,
                pointers["out_ptr"],
                self.fixed["out_strides"],
                num_heads=self.num_heads,
                head_size=self.head_size,
                num_splits=splits,
            )


def sink_decode(
    args: AttentionArgs,
    query_positions: torch.Tensor,
    query_requests: torch.Tensor,
    *,
    workspace: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Attention of each query token by itself, into ``args.out``.

    Args:
        args: the layer and its T query tokens; ``out`` is written and returned.
        query_positions: int32 [T]; -1 marks a padding slot, whose output is zero.
        query_requests: int32 [T], the row of the block table of each token
            (not read for padding).
        workspace: fp32 of ``workspace_shape`` or more; allocated if missing.
        config: tiles; the table's by default.
    """
    q, num_tokens = args.q, args.q.shape[0]
    for name, x in (
        ("query_positions", query_positions),
        ("query_requests", query_requests),
    ):
        require_shape(name, x, "[T]", num_tokens)
        require_dtype(name, x, torch.int32)
        require(x.is_contiguous(), name, "contiguous", list(x.stride()), "copy it")
    check_device(q, query_positions=query_positions, query_requests=query_requests)
    if num_tokens == 0:
        return args.out
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
    return args.out
