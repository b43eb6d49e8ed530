"""The CPU path: exact sink attention over a paged KV cache.

A step is planned once (:func:`plan`) and the plan is shared by all layers; a
layer then runs :func:`attend`, which never touches a block outside the plan.

KV heads may be of several kinds: a kind is a policy with a block table of its own
(:class:`rows.Kind`). A step's plan knows all kinds, a layer's
:class:`heads.HeadCaches` which head is of which kind and where it is kept.

One loop (:mod:`flash`) answers all queries, those of a prefill chunk in tiles, those
of decode and speculation a request at a time with the keys in parts, so that every
thread has work: two calls a layer at most, whatever the mix.

Shape letters: T query tokens, R requests, HQ query heads, HKV KV heads, D head
size, N block size, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba.core import event

from vllm_sink_kernels.cpu import amx, amx_check, flash, write
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.layouts import OWN
from vllm_sink_kernels.cpu.rows import Kind, Tiles, Turns

# Rows of a chunk's tile, queries times G: the more, the fewer times a page comes from
# the third-level cache; their scores take 400 KiB of the second.
TILE_ROWS = 192
# Up to here a request's queries are one tile whose keys are taken in parts.
DECODE_QUERIES = 8
# Keys of a part.
PART_KEYS = 256


@dataclass(frozen=True)
class Plan:
    """A step, for all layers.

    Args:
        decode: Tiles of short queries; None without any.
        prefill: Tiles of the chunks; None without any.
    """

    decode: Tiles | None
    prefill: Tiles | None


def plan(
    kinds: Sequence[Kind],
    query_starts: list[int],
    seq_lens: list[int],
    *,
    block_size: int,
    group_size: int = 1,
    decode_queries: int = DECODE_QUERIES,
    skipped: Sequence[int] | None = None,
) -> Plan:
    """Plan a step, for all layers and all kinds of KV heads.

    Args:
        kinds: The policies, with their block tables.
        query_starts: [R+1] offsets of the requests' query tokens.
        seq_lens: [R] tokens including this step's.
        block_size: N, tokens.
        group_size: G, query heads of a KV head.
        decode_queries: Most queries of a request whose keys are taken in parts.
        skipped: [R] query tokens of each request, its first ones, that are not ours.
    """
    kinds = tuple(kinds)
    tile_queries = max(1, TILE_ROWS // group_size)
    short, long = [], []
    for request, seq_len in enumerate(seq_lens):
        start, end = query_starts[request], query_starts[request + 1]
        start += skipped[request] if skipped is not None else 0
        if end == start:
            continue
        if end - start <= decode_queries:
            short.append((start, end - start, request, seq_len - (end - start)))
            continue
        for row in range(start, end, tile_queries):
            count = min(tile_queries, end - row)
            long.append((row, count, request, seq_len - end + row))
    return Plan(
        _tiles(short, kinds, block_size, -(-PART_KEYS // block_size)),
        _tiles(long, kinds, block_size, 1 << 40),
    )


def _tiles(tiles, kinds, block_size, part_blocks) -> Tiles | None:
    if not tiles:
        return None
    return Tiles(np.array(tiles, np.int64), kinds, block_size, part_blocks)


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
    kind = amx_check.chosen(
        caches.dtype, q.dtype, caches.layout, caches.block_size, caches.head_size
    )
    for tiles in (plan.decode, plan.prefill):
        if tiles is not None:
            flash.attend_tiles(
                q,
                caches,
                tiles,
                out,
                scale=scale,
                turns=turns,
                soft_cap=soft_cap,
                sink_logits=sink_logits,
                kind=kind,
            )


class _Start(event.Listener):
    """Tells once that Numba compiles something."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell
        self.has_told = False

    def on_start(self, event: Any) -> None:
        if not self.has_told:
            self.has_told = True
            self.tell()

    def on_end(self, event: Any) -> None:
        pass


def compile_for(
    cache_dtype: torch.dtype,
    q_dtype: torch.dtype | None = None,
    layout: int = OWN,
    kind: int = amx.NONE,
    *,
    on_start: Callable[[], None] = lambda: None,
) -> bool:
    """Compile the loops for a cache's and a model's dtype now; once a machine.

    Args:
        layout: Of the cache's pages, of :mod:`layouts`; none but our own is written.
        kind: What can multiply in tiles, of :mod:`amx`.
        on_start: Called before the first is compiled; not at all where they are found.

    Returns:
        Whether any was compiled.
    """
    start = _Start(on_start)
    with event.install_listener("numba:run_pass", start):
        flash.loop(cache_dtype, q_dtype or cache_dtype, layout, kind)
        if layout == OWN:
            write.loop(cache_dtype)
    return start.has_told
