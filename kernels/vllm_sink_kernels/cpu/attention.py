"""The CPU path: exact sink attention over a paged KV cache.

A step is planned once (:func:`plan`) and the plan is shared by all layers; a
layer then runs :func:`attend`, which never touches a block outside the plan.

Short queries (decode, speculation) read the retained keys in place
(:mod:`decode`). Longer ones, prefill chunks, gather their window's
blocks once and run torch's flash attention over it in tiles of queries; the
sinks that have left the window are merged in afterwards by log-sum-exp, because
they meet another query, the turned one.

Shape letters: T query tokens, R requests, HQ query heads, HKV KV heads, D head
size, N block size, B blocks, G = HQ / HKV, L keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sink_kernels.cpu import decode, merge, write
from vllm_sink_kernels.cpu.rows import Rows

# A tile of n queries computes W + n - 1 keys for each, of which W are seen:
# small tiles waste less, and torch's kernel is as fast at 64 as at 128.
TILE_QUERIES = 64
# Up to here a request's queries are rows of the decode loop.
DECODE_QUERIES = 8


@dataclass(frozen=True)
class Tile:
    """Consecutive queries of one chunk and the keys of their windows.

    Args:
        start, end: The tile's rows among the step's query tokens.
        low, high: The tile's keys among the chunk's gathered ones.
        bias: [end-start, high-low] float32, 0 or -inf.
    """

    start: int
    end: int
    low: int
    high: int
    bias: torch.Tensor


@dataclass(frozen=True)
class Chunk:
    """A request's prefill chunk.

    Args:
        blocks: int64 ids of the blocks of all its windows, consecutive.
        skip: Keys of the first block that no query sees.
        tiles: Cover the chunk's queries.
    """

    blocks: torch.Tensor
    skip: int
    tiles: list[Tile]


@dataclass(frozen=True)
class Plan:
    """A step, for all layers.

    Args:
        decode: Rows of short queries; None without any.
        chunks: The prefill chunks.
        prefill: Rows of the chunks' queries; None without any.
        is_merged: Whether a chunk's query has a sink outside its window.
    """

    decode: Rows | None
    chunks: list[Chunk]
    prefill: Rows | None
    is_merged: bool


def plan(
    block_table: torch.Tensor,
    query_starts: list[int],
    seq_lens: list[int],
    *,
    num_sink_tokens: int,
    window_size: int,
    block_size: int,
    tile_queries: int = TILE_QUERIES,
    decode_queries: int = DECODE_QUERIES,
) -> Plan:
    """Plan a step.

    Args:
        block_table: [R, max_blocks] int32; entries in the gap may be stale and
            are not read. Kept, not copied.
        query_starts: [R+1] offsets of the requests' query tokens.
        seq_lens: [R] tokens including this step's.
        num_sink_tokens: S. window_size: W, the query's own included.
        block_size: N, tokens.
        tile_queries: Most queries a tile.
        decode_queries: Most queries of a request for the decode loop.
    """
    short: list[int] = []
    long: list[int] = []
    chunks = []
    biases: dict[tuple[int, int, int], torch.Tensor] = {}
    for request, seq_len in enumerate(seq_lens):
        start, end = query_starts[request], query_starts[request + 1]
        if end - start <= decode_queries:
            short.append(request)
            continue
        long.append(request)
        first = seq_len - (end - start)
        low = max(0, first - window_size + 1)
        first_block = low // block_size
        blocks = block_table[request, first_block : -(-seq_len // block_size)]
        tiles = []
        for row in range(start, end, tile_queries):
            p0 = first + row - start
            p1 = min(p0 + tile_queries, seq_len)
            tile_low = max(0, p0 - window_size + 1)
            shape = (p0 - tile_low, p1 - tile_low, window_size)
            if shape not in biases:
                biases[shape] = _bias(*shape)
            tiles.append(
                Tile(row, row + p1 - p0, tile_low - low, p1 - low, biases[shape])
            )
        chunks.append(Chunk(blocks.long(), low - first_block * block_size, tiles))

    def rows_of(requests: list[int]) -> Rows | None:
        counts = [query_starts[i + 1] - query_starts[i] for i in requests]
        if not sum(counts):
            return None
        pairs = list(zip(requests, counts, strict=True))
        return Rows(
            np.concatenate([query_starts[i] + np.arange(n) for i, n in pairs]),
            np.repeat(np.array(requests), counts),
            np.concatenate([seq_lens[i] - n + np.arange(n) for i, n in pairs]),
            block_table.numpy(),
            num_sink_tokens,
            window_size,
        )

    return Plan(
        decode=rows_of(short),
        chunks=chunks,
        prefill=rows_of(long),
        is_merged=bool(num_sink_tokens)
        and any(seq_lens[request] > window_size for request in long),
    )


def _bias(first: int, num_keys: int, window_size: int) -> torch.Tensor:
    """[num_keys - first, num_keys]; the first query is key ``first``'s own."""
    keys = torch.arange(num_keys)
    queries = keys[first:].unsqueeze(1)
    visible = (keys <= queries) & (queries - keys < window_size)
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: Plan,
    out: torch.Tensor,
    *,
    scale: float,
    turn: tuple[torch.Tensor, torch.Tensor, bool] | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of every query, written into ``out`` in place.

    Args:
        q: [T, HQ, D].
        kv_cache: [B, HKV, 2N, D]: a block's N keys, then its N values.
        plan: From :func:`plan`.
        out: [T, HQ, D].
        scale: Softmax scale.
        turn: cos and sin [T, rotary_dim/2] and is_neox; None leaves the query
            as it is (``absolute`` sink positions).
        soft_cap: Logits become cap * tanh(logits / cap); 0 is off.
        sink_logits: [HQ], the learned logit in the softmax denominator.
    """
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous()
    options: dict[str, Any] = dict(
        scale=scale, soft_cap=soft_cap, sink_logits=sink_logits, turn=turn
    )
    if plan.decode is not None:
        decode.decode(q, kv_cache, plan.decode, out, **options)
    if plan.prefill is None:
        return
    q = q.float().contiguous()
    result = out
    if out.dtype != torch.float32 or not out.is_contiguous():
        result = torch.empty(out.shape)
    lse = torch.empty(q.shape[:2])
    block_size = kv_cache.shape[2] // 2
    for chunk in plan.chunks:
        # [HKV, blocks, 2N, D], then [1, HKV, keys, D]
        pages = kv_cache[chunk.blocks].transpose(0, 1).float()
        keys = pages[:, :, :block_size].flatten(1, 2)[None, :, chunk.skip :]
        values = pages[:, :, block_size:].flatten(1, 2)[None, :, chunk.skip :]
        for tile in chunk.tiles:
            rows, span = slice(tile.start, tile.end), slice(tile.low, tile.high)
            window, denominator = _window_attention(
                q[rows].transpose(0, 1)[None],
                keys[:, :, span],
                values[:, :, span],
                tile.bias,
                scale,
                soft_cap,
            )
            result[rows] = window[0].transpose(0, 1)
            lse[rows] = denominator[0].transpose(0, 1)
    if plan.is_merged or sink_logits is not None:
        merge.merge_sinks(q, kv_cache, plan.prefill, lse, result, **options)
    if result is not out:
        changed = torch.from_numpy(plan.prefill.rows)
        out[changed] = result[changed].to(out.dtype)


def _window_attention(q, keys, values, bias, scale, soft_cap):
    """q [1, HQ, T, D], keys and values [1, HKV, L, D] -> [1, HQ, T, D], [1, HQ, T]."""
    if not soft_cap:
        # The operator behind scaled_dot_product_attention, which drops the
        # log-sum-exp; it shares KV heads among query heads itself.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, attn_mask=bias[None, None], scale=scale
        )
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = soft_cap * torch.tanh(q @ keys.transpose(-1, -2) * (scale / soft_cap))
    scores += bias
    return torch.softmax(scores, dim=-1) @ values, torch.logsumexp(scores, dim=-1)


def compile_for(kv_cache_dtype: torch.dtype) -> None:
    """Compile the loops for a cache dtype now; seconds, once a machine."""
    for module in (decode, merge, write):
        module.loop(kv_cache_dtype)
