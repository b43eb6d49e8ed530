"""Prefill where another kernel attends to the window; the sinks are added after it.

FlashAttention knows windows, not sinks. It is given a request as if it began with the
first block that the window of its first query needs, so that it never addresses the
gap, and leaves the log-sum-exp of each row. Rows then go on over the sinks that their
window has left, as the next tiles of the same online softmax::

    keys    0 .. S-1 |     gap      | first row's window .. last row's position
    here    turned q   not in table   FlashAttention, window_size=(W - 1, 0)

A row at ``p`` adds keys ``0 .. min(S, p - W + 1) - 1``: none before position W. A batch
that ends before S + W sees every key at its true distance: one causal call, no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sink_kernels.triton.arguments import AttentionArgs, Pointers, Variant
from vllm_sink_kernels.triton.checks import pow2
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.primitives import (
    LOG2E,
    SINK_MASK,
    Keys,
    attend_range,
    find_queries,
)
from vllm_sink_kernels.triton.turn import turn_query

ADD_SINKS = LaunchConfig(block_m=64, block_n=16, num_warps=4, num_stages=2)
EVERY_KEY = 1 << 30
BLOCK = 128


@dataclass(frozen=True)
class WindowView:
    """R requests of a step, each from the first block that its window needs.

    Args:
        block_table: int32 [R, width]; the null block past a request's last.
        query_start_loc: int32 [R + 1], from 0.
        seq_lens: int32 [R], tokens from that block on; 0 of an empty request.
        max_query_len, max_seq_len: at least the largest; the host's numbers.
        is_whole: every query sees every key before it.
    """

    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    is_whole: bool

    @classmethod
    def of(
        cls,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        max_query_len: int,
        max_seq_len: int,
        first_request: int,
        first_token: int,
        *,
        block_size: int,
        num_sink_tokens: int,
        window_size: int,
    ) -> WindowView:
        """One launch for all layers of a step; nothing waits for the device.

        Args:
            block_table, query_start_loc, seq_lens: as for ``sink_prefill``.
            max_query_len, max_seq_len: no request has more; the host's numbers.
            first_request, first_token: earlier ones are left out.
        """
        num_requests = seq_lens.shape[0] - first_request
        is_whole = max_seq_len <= num_sink_tokens + window_size
        if not is_whole:
            max_seq_len = min(max_seq_len, max_query_len + window_size - 1 + block_size)
        width = triton.cdiv(max_seq_len, block_size)
        new: dict[str, Any] = {"dtype": torch.int32, "device": block_table.device}
        view = cls(
            torch.empty(num_requests, width, **new),
            torch.empty(num_requests + 1, **new),
            torch.empty(num_requests, **new),
            max_query_len,
            max_seq_len,
            is_whole,
        )
        window_view_kernel[(num_requests, triton.cdiv(width, BLOCK))](
            block_table,
            query_start_loc,
            seq_lens,
            view.block_table,
            view.query_start_loc,
            view.seq_lens,
            first_request,
            first_token,
            num_requests,
            width,
            EVERY_KEY if is_whole else window_size,
            block_table.stride(0),
            BLOCK_SIZE=block_size,
            BLOCK=BLOCK,
            num_warps=4,
        )
        return view


@triton.jit(
    do_not_specialize=[
        "first_request",
        "first_token",
        "num_requests",
        "width",
        "window_size",
    ],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_ptr"],
)
def window_view_kernel(
    block_table_ptr,  # int32 [first_request + R, max_blocks]
    query_start_ptr,  # int32 [first_request + R + 1]
    seq_lens_ptr,  # int32 [first_request + R]
    out_table_ptr,  # int32 [R, width]
    out_start_ptr,  # int32 [R + 1]
    out_lens_ptr,  # int32 [R]
    first_request,
    first_token,
    num_requests,
    width,
    window_size,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_r = tl.program_id(0)
    i_request = first_request + i_r
    i_start = tl.load(query_start_ptr + i_request)
    i_end = tl.load(query_start_ptr + i_request + 1)
    # Of an empty request, such as padding, nothing is known: not a key.
    m_any = i_end > i_start
    seq_len = tl.where(m_any, tl.load(seq_lens_ptr + i_request), 0)
    i_first = tl.maximum(seq_len - (i_end - i_start) - window_size + 1, 0)
    i_first = tl.where(m_any, i_first // BLOCK_SIZE, 0)
    o_b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_table = block_table_ptr + tl.cast(i_request, tl.int64) * stride_table
    m_held = (i_first + o_b) * BLOCK_SIZE < seq_len
    b_block = tl.load(p_table + i_first + o_b, mask=m_held, other=0)
    p_out = out_table_ptr + tl.cast(i_r, tl.int64) * width
    tl.store(p_out + o_b, b_block, mask=o_b < width)
    if tl.program_id(1) == 0:
        tl.store(out_lens_ptr + i_r, seq_len - i_first * BLOCK_SIZE)
        tl.store(out_start_ptr + i_r, i_start - first_token)
        if i_r == num_requests - 1:
            tl.store(out_start_ptr + num_requests, i_end - first_token)


@triton.jit(
    do_not_specialize=["first_request", "first_token", "num_requests", "stride_lse"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_ptr"],
)
def add_sinks_kernel(
    q_ptr,  # [T, HQ, D]
    k_ptr,  # [B, N, HKV, D]
    v_ptr,
    block_table_ptr,  # int32 [R, max_blocks]
    query_start_ptr,  # int32 [R + 1]
    seq_lens_ptr,  # int32 [R]
    lse_ptr,  # fp32 [HQ, T - first_token], natural
    out_ptr,  # [T, HQ, D], of the window; changed in place
    q_strides,
    k_strides,
    v_strides,
    stride_table,
    stride_lse,
    out_strides,
    scores,  # Scores, of which the scale is read: there is no more
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
):
    """Grid (query tiles, HKV), as ``sink_prefill_kernel`` has it."""
    GROUP: tl.constexpr = VARIANT.group
    num_sink_tokens, window_size = policy
    i_tile = tl.program_id(0)
    i_h = tl.program_id(1)
    i_r, i_start, query_len, i_first = find_queries(
        query_start_ptr, first_request, num_requests, first_token, i_tile, TILE_Q
    )
    num_computed = tl.load(seq_lens_ptr + i_r) - query_len
    last = num_computed + tl.minimum(i_first + TILE_Q, query_len) - 1
    if i_first >= query_len or last < window_size:
        return  # the window of every row begins with key 0
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_q = i_first + o_m // GROUP  # query of the row, within the request
    o_h = i_h * GROUP + o_m % GROUP
    m_m = (o_m < TILE_Q * GROUP) & (o_q < query_len)
    m_md = m_m[:, None] & (o_d < VARIANT.head_size)[None, :]
    b_pos = num_computed + o_q
    o_t = (i_start + o_q).to(tl.int64)
    p_q = q_ptr + o_t * q_strides[0] + o_h * q_strides[1]
    p_o = out_ptr + o_t * out_strides[0] + o_h * out_strides[1]
    p_o = p_o[:, None] + o_d[None, :]
    keys = Keys(
        block_table_ptr + tl.cast(i_r, tl.int64) * stride_table,
        k_ptr + i_h.to(tl.int64) * k_strides[2],
        v_ptr + i_h.to(tl.int64) * v_strides[2],
        k_strides,
        v_strides,
        window_size,
        scores.scale * LOG2E,
        None,
    )

    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_md, other=0.0)
    if turn is not None:
        budget = num_sink_tokens + window_size
        b_turned = b_q.to(tl.float32)
        b_turned = turn_query(b_turned, p_q, b_pos, m_m, budget, turn, VARIANT)
        b_q = b_turned.to(b_q.dtype)
    # The window's part is a state of the online softmax whose weights sum to 1.
    p_lse = lse_ptr + o_h.to(tl.int64) * stride_lse + (o_t - first_token)
    b_max = tl.load(p_lse, mask=m_m, other=0.0) * LOG2E
    b_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    b_acc = tl.load(p_o, mask=m_md, other=0.0).to(tl.float32)
    b_acc, b_max, b_sum = attend_range(
        (b_acc, b_max, b_sum),
        b_q,
        b_pos - window_size,  # a row adds the sinks up to the one that left last
        0,
        0,
        tl.minimum(num_sink_tokens, last - window_size + 1),
        keys,
        VARIANT,
        BLOCK_N,
        False,
        SINK_MASK,
    )
    b_o = (b_acc / b_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(p_o, b_o, mask=m_md)


def kernel_constants(variant: Variant, config: LaunchConfig) -> dict[str, Any]:
    """The compile-time arguments of ``add_sinks_kernel``."""
    block_m = max(config.block_m, int(triton.next_power_of_2(variant.group)))
    return {
        "VARIANT": variant,
        "TILE_Q": block_m // variant.group,
        "BLOCK_M": block_m,
        "BLOCK_D": pow2(variant.head_size),
        "BLOCK_N": config.block_n,
    }


class WindowPrefill:
    """A layer's prefill with a kernel of others for the window.

    Args:
        args: the layer; heads of one policy, 16-bit, without soft cap or sink logits.
        attend: called as ``flash_attn_varlen_func`` of vLLM's FlashAttention 3.
    """

    def __init__(
        self,
        args: AttentionArgs,
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        config: LaunchConfig = ADD_SINKS,
    ) -> None:
        assert args.heads is None and not args.soft_cap and args.sink_logits is None
        variant = args.variant()
        constants = kernel_constants(variant, config)
        self.attend, self.scale = attend, args.scale
        self.num_sink_tokens = args.num_sink_tokens
        self.window_size = args.window_size
        self.block_size = variant.block_size
        self.num_kv_heads, self.tile_q = args.num_kv_heads, constants["TILE_Q"]
        self.fixed = {
            **args.fixed(),
            **constants,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def view(self, *batch: Any) -> WindowView:
        """The step's requests as ``attend`` takes them; see ``WindowView.of``."""
        return WindowView.of(
            *batch,
            block_size=self.block_size,
            num_sink_tokens=self.num_sink_tokens,
            window_size=self.window_size,
        )

    def __call__(
        self,
        pointers: Pointers,
        view: WindowView,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        num_tokens: int,
        first_request: int = 0,
        first_token: int = 0,
    ) -> None:
        """Launch; ``pointers`` as ``AttentionArgs.pointers`` names them."""
        out = pointers["out_ptr"]
        got, lse = self.attend(
            pointers["q_ptr"][first_token:num_tokens],
            pointers["k_ptr"],
            pointers["v_ptr"],
            max_seqlen_q=view.max_query_len,
            cu_seqlens_q=view.query_start_loc,
            max_seqlen_k=view.max_seq_len,
            seqused_k=view.seq_lens,
            softmax_scale=self.scale,
            causal=True,
            window_size=[-1, -1] if view.is_whole else [self.window_size - 1, 0],
            block_table=view.block_table,
            return_softmax_lse=True,
            out=out[first_token:num_tokens],
            fa_version=3,
        )
        assert got.data_ptr() == out[first_token:].data_ptr(), "out was not written"
        if view.is_whole or not self.num_sink_tokens:
            return
        num_requests = seq_lens.shape[0]
        tiles = (num_tokens - first_token) // self.tile_q + num_requests - first_request
        names = ("q_ptr", "k_ptr", "v_ptr", "block_table_ptr", "out_ptr")
        add_sinks_kernel[(tiles, self.num_kv_heads)](
            **{name: pointers[name] for name in names},
            query_start_ptr=query_start_loc,
            seq_lens_ptr=seq_lens,
            lse_ptr=lse,
            first_request=first_request,
            first_token=first_token,
            num_requests=num_requests,
            stride_lse=lse.stride(0),
            **self.fixed,
        )
