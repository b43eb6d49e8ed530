"""The CPU path: exact sink attention over a paged KV cache.

A step is planned once (:func:`plan`) and the plan is shared by all layers; a
layer then runs :func:`attend`, which never touches a block outside the plan.

KV heads may be of several kinds: a kind is a policy with a block table of its own
(:class:`rows.Kind`). A step's plan knows all kinds, a layer's
:class:`heads.HeadCaches` which head is of which kind and where it is kept.

Short queries (decode, speculation) read the retained keys in place, all heads in
one call (:mod:`decode`). Longer ones, prefill chunks, gather their window's
blocks once and run torch's flash attention over it in tiles of queries, all heads
of a kind at once; the sinks that have left the window are merged in afterwards by
log-sum-exp, because they meet another query, the turned one.

Shape letters: T query tokens, R requests, HQ query heads, HKV KV heads, D head
size, N block size, B blocks, G = HQ / HKV, L keys of a tile, K kinds of KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sink_kernels.cpu import decode, merge, write
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.rows import Kind, Rows, Turns

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
        chunks: The prefill chunks, for every kind.
        prefill: Rows of the chunks' queries; None without any.
        is_merged: For every kind, whether a chunk's query has a sink outside its
            window.
    """

    decode: Rows | None
    chunks: tuple[list[Chunk], ...]
    prefill: Rows | None
    is_merged: tuple[bool, ...]


def plan(
    kinds: Sequence[Kind],
    query_starts: list[int],
    seq_lens: list[int],
    *,
    block_size: int,
    tile_queries: int = TILE_QUERIES,
    decode_queries: int = DECODE_QUERIES,
) -> Plan:
    """Plan a step, for all layers and all kinds of KV heads.

    Args:
        kinds: The policies, with their block tables.
        query_starts: [R+1] offsets of the requests' query tokens.
        seq_lens: [R] tokens including this step's.
        block_size: N, tokens.
        tile_queries: Most queries a tile.
        decode_queries: Most queries of a request for the decode loop.
    """
    kinds = tuple(kinds)
    counts = np.diff(query_starts)
    is_long = counts > decode_queries
    requests = np.arange(len(counts))

    def rows_of(requests: np.ndarray) -> Rows | None:
        if not counts[requests].sum():
            return None
        ends = np.cumsum(counts[requests])
        of_row = np.repeat(np.arange(len(requests)), counts[requests])
        place = np.arange(ends[-1]) - (ends - counts[requests])[of_row]
        first = np.array(seq_lens)[requests] - counts[requests]
        return Rows(
            np.array(query_starts)[requests][of_row] + place,
            requests[of_row],
            first[of_row] + place,
            kinds,
        )

    long = requests[is_long].tolist()
    return Plan(
        decode=rows_of(requests[~is_long]),
        chunks=tuple(
            _chunks(kind, long, query_starts, seq_lens, block_size, tile_queries)
            for kind in kinds
        ),
        prefill=rows_of(requests[is_long]),
        is_merged=tuple(
            bool(kind.num_sink_tokens)
            and any(seq_lens[request] > kind.window_size for request in long)
            for kind in kinds
        ),
    )


def _chunks(
    kind: Kind,
    requests: list[int],
    query_starts: list[int],
    seq_lens: list[int],
    block_size: int,
    tile_queries: int,
) -> list[Chunk]:
    chunks = []
    biases: dict[tuple[int, int, int], torch.Tensor] = {}
    window_size = kind.window_size
    for request in requests:
        seq_len = seq_lens[request]
        start, end = query_starts[request], query_starts[request + 1]
        first = seq_len - (end - start)
        low = max(0, first - window_size + 1)
        first_block = low // block_size
        blocks = kind.block_table[request, first_block : -(-seq_len // block_size)]
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
    return chunks


def _bias(first: int, num_keys: int, window_size: int) -> torch.Tensor:
    """[num_keys - first, num_keys]; the first query is key ``first``'s own."""
    keys = torch.arange(num_keys)
    queries = keys[first:].unsqueeze(1)
    visible = (keys <= queries) & (queries - keys < window_size)
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def attend(
    q: torch.Tensor,
    caches: HeadCaches,
    plan: Plan,
    out: torch.Tensor,
    *,
    scale: float,
    turns: Turns | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of every query, written into ``out`` in place.

    Args:
        q: [T, HQ, D].
        caches: The layer's; its heads' kinds are places in the plan's.
        plan: From :func:`plan`.
        out: [T, HQ, D].
        scale: Softmax scale.
        turns: The sink turn of the step's tokens; None leaves the query as it is
            (``absolute`` sink positions).
        soft_cap: Logits become cap * tanh(logits / cap); 0 is off.
        sink_logits: [HQ], the learned logit in the softmax denominator.
    """
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous()
    options: dict[str, Any] = dict(
        scale=scale, soft_cap=soft_cap, sink_logits=sink_logits, turns=turns
    )
    if plan.decode is not None:
        decode.decode(q, caches, plan.decode, out, **options)
    if plan.prefill is None:
        return
    q = q.float().contiguous()
    result = out
    if out.dtype != torch.float32 or not out.is_contiguous():
        result = torch.empty(out.shape)
    lse = torch.empty(q.shape[:2])
    grouped = (len(q), caches.num_heads, -1, caches.head_size)
    is_merged = sink_logits is not None
    for kind, heads in caches.heads_of_kind.items():
        # Views, unless the kind's heads are neither all nor evenly spaced.
        chosen = _slice(heads)
        part = result.view(grouped)[:, chosen]  # [T, heads, G, D]
        _attend_windows(
            q.view(grouped)[:, chosen],
            [caches.tensors[head] for head in heads],
            plan.chunks[kind],
            part,
            part_lse := lse.view(grouped[:3])[:, chosen],
            scale,
            soft_cap,
        )
        if not isinstance(chosen, slice):
            result.view(grouped)[:, chosen] = part
            lse.view(grouped[:3])[:, chosen] = part_lse
        is_merged |= plan.is_merged[kind]
    if is_merged:
        merge.merge_sinks(q, caches, plan.prefill, lse, result, **options)
    if result is not out:
        changed = torch.from_numpy(plan.prefill.rows)
        out[changed] = result[changed].to(out.dtype)


def _slice(heads: list[int]) -> slice | list[int]:
    """The same heads as a slice, if they are evenly spaced."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    evenly = slice(heads[0], heads[-1] + 1, step)
    return evenly if list(range(evenly.start, evenly.stop, step)) == heads else heads


def _attend_windows(q, caches, chunks, out, lse, scale, soft_cap):
    """Heads of one kind: q and out [T, heads, G, D], caches heads x [B, 2N, D]."""
    block_size = caches[0].shape[1] // 2
    for chunk in chunks:
        # [heads, blocks, 2N, D], then [1, heads, keys, D]
        pages = torch.stack([cache[chunk.blocks] for cache in caches]).float()
        keys = pages[:, :, :block_size].flatten(1, 2)[None, :, chunk.skip :]
        values = pages[:, :, block_size:].flatten(1, 2)[None, :, chunk.skip :]
        for tile in chunk.tiles:
            rows, span = slice(tile.start, tile.end), slice(tile.low, tile.high)
            window, denominator = _window_attention(
                q[rows].flatten(1, 2).transpose(0, 1)[None],
                keys[:, :, span],
                values[:, :, span],
                tile.bias,
                scale,
                soft_cap,
            )
            out[rows] = window[0].transpose(0, 1).view_as(out[rows])
            lse[rows] = denominator[0].transpose(0, 1).view_as(lse[rows])


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
