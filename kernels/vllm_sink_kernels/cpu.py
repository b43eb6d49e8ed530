"""The CPU path: exact sink attention over a paged KV cache in plain torch.

A step is planned once (:func:`plan`) and the plan is shared by all layers: the
query tiles, the blocks that each tile gathers, its mask. A layer then runs
:func:`attend`, which never touches a block outside the plan.

Shape letters: T query tokens, HQ query heads, HKV KV heads, D head size,
N block size, B blocks, G = HQ / HKV, L keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Queries a tile. Larger tiles waste work on the window's two ragged edges,
# smaller ones pay Python and gather per tile.
TILE_QUERIES = 128


@dataclass(frozen=True)
class Tile:
    """Consecutive queries of one request and the keys that they see.

    Args:
        start, end: The tile's rows among the step's query tokens.
        sink_blocks: [num_sink_blocks] int64, or None without sinks.
        num_sinks: Sink keys taken from them: positions 0 .. num_sinks-1.
        window_blocks: int64 block ids, consecutive positions.
        window_skip: Keys of the first window block that are in the gap.
        num_window: Keys of the window part.
        bias: [end-start, num_sinks + num_window] float32, 0 or -inf; None
            where every key is visible.
        turned: Whether the sink keys meet the turned query.
    """

    start: int
    end: int
    sink_blocks: torch.Tensor | None
    num_sinks: int
    window_blocks: torch.Tensor
    window_skip: int
    num_window: int
    bias: torch.Tensor | None
    turned: bool


def plan(
    block_table: torch.Tensor,
    query_starts: list[int],
    seq_lens: list[int],
    *,
    num_sink_tokens: int,
    window_size: int,
    block_size: int,
    tile_queries: int = TILE_QUERIES,
) -> list[Tile]:
    """Cut a step's queries into tiles.

    Args:
        block_table: [R, max_blocks] int32; entries in the gap may be stale and
            are not read.
        query_starts: [R+1] offsets of the requests' query tokens.
        seq_lens: [R] tokens including this step's.
        num_sink_tokens: S. window_size: W, the query's own included.
        block_size: N, tokens.
        tile_queries: Most queries a tile.
    """
    tiles = []
    budget = num_sink_tokens + window_size
    for request, seq_len in enumerate(seq_lens):
        q_start, q_end = query_starts[request], query_starts[request + 1]
        first_position = seq_len - (q_end - q_start)
        row = block_table[request]
        for start in range(q_start, q_end, tile_queries):
            end = min(start + tile_queries, q_end)
            p0 = first_position + start - q_start
            p1 = p0 + end - start
            num_sinks = min(num_sink_tokens, p1)
            low = min(max(num_sinks, p0 - window_size + 1), p1)
            first_block = low // block_size
            sink_blocks = None
            if num_sinks:
                sink_blocks = row[: -(-num_sinks // block_size)].long()
            tiles.append(
                Tile(
                    start=start,
                    end=end,
                    sink_blocks=sink_blocks,
                    num_sinks=num_sinks,
                    window_blocks=row[first_block : -(-p1 // block_size)].long(),
                    window_skip=low - first_block * block_size,
                    num_window=p1 - low,
                    bias=_bias(p0, p1, num_sinks, low, num_sink_tokens, window_size),
                    turned=p1 > budget,
                )
            )
    return tiles


def _bias(
    p0: int, p1: int, num_sinks: int, low: int, num_sink_tokens: int, window_size: int
) -> torch.Tensor | None:
    if p1 - p0 == 1:
        return None  # one query sees all that its tile gathers
    keys = torch.cat([torch.arange(num_sinks), torch.arange(low, p1)])
    queries = torch.arange(p0, p1).unsqueeze(1)
    visible = (keys <= queries) & (
        (keys < num_sink_tokens) | (queries - keys < window_size)
    )
    bias = torch.zeros(visible.shape)
    return bias.masked_fill_(~visible, float("-inf"))


def turn_query(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    """Rotate q by the given angles.

    Args:
        q: [T, HQ, D] float32.
        cos, sin: [T, rotary_dim/2] float32.
        is_neox: Pairs are (i, i + rotary_dim/2), else (2i, 2i + 1).

    Returns:
        [T, HQ, D] float32, a new tensor; dims from rotary_dim on are copies.
    """
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = q.clone()
    if is_neox:
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    x, y = q[..., first], q[..., second]
    turned[..., first] = x * cos - y * sin
    turned[..., second] = y * cos + x * sin
    return turned


def attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    tiles: list[Tile],
    out: torch.Tensor,
    *,
    scale: float,
    turn: tuple[torch.Tensor, torch.Tensor, bool] | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of every tile, written into ``out`` in place.

    Args:
        q: [T, HQ, D].
        kv_cache: [B, HKV, 2N, D]: a block's N keys, then its N values.
        tiles: From :func:`plan`.
        out: [T, HQ, D].
        scale: Softmax scale.
        turn: cos and sin [T, rotary_dim/2] and is_neox; None leaves the query
            as it is (``absolute`` sink positions).
        soft_cap: Logits become cap * tanh(logits / cap); 0 is off.
        sink_logits: [HQ], the learned logit in the softmax denominator.
    """
    num_kv_heads, double_block, head_size = kv_cache.shape[1:]
    block_size = double_block // 2
    group = q.shape[1] // num_kv_heads
    for tile in tiles:
        num_queries = tile.end - tile.start
        q_tile = q[tile.start : tile.end].float() * scale
        window = _gather(kv_cache, tile.window_blocks)
        keys = window[:, :, :block_size].flatten(1, 2)
        values = window[:, :, block_size:].flatten(1, 2)
        last = tile.window_skip + tile.num_window
        keys = keys[:, tile.window_skip : last]
        values = values[:, tile.window_skip : last]
        # [HKV, G * queries, L]
        scores = _grouped(q_tile, num_kv_heads) @ keys.transpose(1, 2)
        if tile.sink_blocks is not None:
            sinks = _gather(kv_cache, tile.sink_blocks)
            sink_keys = sinks[:, :, :block_size].flatten(1, 2)[:, : tile.num_sinks]
            sink_values = sinks[:, :, block_size:].flatten(1, 2)[:, : tile.num_sinks]
            if turn is not None and tile.turned:
                cos, sin, is_neox = turn
                rows = slice(tile.start, tile.end)
                q_tile = turn_query(q_tile, cos[rows], sin[rows], is_neox)
            sink_scores = _grouped(q_tile, num_kv_heads) @ sink_keys.transpose(1, 2)
            scores = torch.cat([sink_scores, scores], dim=-1)
            values = torch.cat([sink_values, values], dim=1)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if tile.bias is not None:
            scores.view(num_kv_heads, group, num_queries, -1).add_(tile.bias)
        weights = _softmax(scores, sink_logits, num_queries)
        result = (weights @ values).view(num_kv_heads, group, num_queries, head_size)
        out[tile.start : tile.end].copy_(
            result.permute(2, 0, 1, 3).reshape(num_queries, -1, head_size)
        )


def _gather(kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[n] block ids -> [HKV, n, 2N, D] float32."""
    return kv_cache[blocks].transpose(0, 1).float()


def _grouped(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, HQ, D] -> [HKV, G * T, D], the query heads of a KV head together."""
    num_queries, _, head_size = q.shape
    grouped = q.view(num_queries, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
    return grouped.reshape(num_kv_heads, -1, head_size)


def _softmax(
    scores: torch.Tensor, sink_logits: torch.Tensor | None, num_queries: int
) -> torch.Tensor:
    if sink_logits is None:
        return torch.softmax(scores, dim=-1)
    logits = sink_logits.float().view(scores.shape[0], -1, 1)
    logits = logits.expand(-1, -1, num_queries).reshape(scores.shape[0], -1, 1)
    return torch.softmax(torch.cat([logits, scores], dim=-1), dim=-1)[..., 1:]


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Store a step's keys and values in place.

    Args:
        key, value: [T, HKV, D].
        kv_cache: [B, HKV, 2N, D].
        blocks, offsets: [T] int64, each token's block and slot in it.
    """
    block_size = kv_cache.shape[2] // 2
    kv_cache[blocks, :, offsets] = key.to(kv_cache.dtype)
    kv_cache[blocks, :, offsets + block_size] = value.to(kv_cache.dtype)
