"""The loop of the CPU path: attention of tiles of queries, the keys read in place.

A tile is some consecutive queries of one request; an item of work is a tile, a KV
head and a part of its keys (flash attention, Dao et al. 2022; the parts as in
flash-decoding, 2023). Keys that have left the window, the sinks, meet the turned
query; the rest meet the query as it is. A tile's keys are taken :data:`KEYS` at a
time: products with all its queries, their softmax, products with the values. Where
a span is only partly visible, at the edges of the window, it is taken for a few
queries at a time and only from the first key that one of them sees to the last.
Nothing but the products of whole vectors at those ends is computed in vain.

Whichever thread finishes a head's last part merges them, in the parts' order.

Shape letters: T query tokens, HQ query heads, HKV KV heads, D head size, N block
size, G = HQ / HKV, M rows of a tile (its queries times G), P parts.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload

from vllm_sink_kernels.cpu import micro, native
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.micro import LANES, ROWS
from vllm_sink_kernels.cpu.native import OPTIONS, array, at, put, take
from vllm_sink_kernels.cpu.rows import (
    COS,
    FIELDS,
    SIN,
    SINKS,
    STRIDE,
    TABLE,
    WINDOW,
    Tiles,
    Turns,
)
from vllm_sink_kernels.cpu.span import KEYS, PITCH, add_logits, merge, span

# Floats of keys and values up to which one thread is as fast as two, of which the
# other has to wake (SmolLM2-135M on two cores: up to 170 keys).
SERIAL_FLOATS = 64 * 1024

Job, _SIGNATURE = native.job_type(
    "FlashJob",
    FIELDS + "q q_stride out out_stride max_parts partial "
    "num_done threads scratch scratch_bytes",
    "scale soft_cap",
)


def attend_tiles(
    q: torch.Tensor,
    caches: HeadCaches,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    scale: float,
    turns: Turns | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of the tiles' queries, written into ``out``: one call a layer.

    Args:
        q, out: [T, HQ, D], the step's tokens, of one dtype.
        caches: The layer's; its heads may be of several kinds.
        turns: The sink turn of the step's tokens; None leaves the query as it is.
        scale, soft_cap, sink_logits: As in :func:`cpu.attend`.
    """
    q, result = _rows(q), out
    if _rows(out) is not out or out.dtype != q.dtype:
        result = torch.empty(out.shape, dtype=q.dtype)
    _, num_heads, head_size = q.shape
    job = tiles.job(Job, caches, num_heads, turns, sink_logits)
    job.q, job.q_stride = q.data_ptr(), q.stride(0)
    job.out, job.out_stride = result.data_ptr(), result.stride(0)
    job.scale, job.soft_cap = scale, soft_cap
    size = tiles.size(caches, num_heads)
    job.max_parts = size.max_parts
    if size.max_parts > 1:
        job.partial = tiles.scratch("parts", size.parts_bytes)
    job.num_done = tiles.zeros("done", job.num_tiles * caches.num_heads, np.int64)
    num_threads = torch.get_num_threads() if size.num_floats > SERIAL_FLOATS else 1
    # q twice, its bits, scores, sums; a row's maximum, denominator and peak.
    floats = size.num_rows * (3 * head_size + head_size // 2 + PITCH + 3) + 8 * LANES
    job.scratch_bytes = -(-4 * floats // 64) * 64
    job.scratch = tiles.scratch("tiles", num_threads * job.scratch_bytes)
    job.threads = tiles.counter()
    native.run(loop(caches.dtype, q.dtype), job, num_threads)
    if result is not out:
        changed = torch.from_numpy(tiles.rows)
        out[changed] = result[changed].to(out.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x``, a token's [heads, D] consecutive."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _is_dot(cache_dtype: torch.dtype, q_dtype: torch.dtype) -> bool:
    return micro.HAS_DOT and cache_dtype == q_dtype == torch.bfloat16


@functools.cache
def loop(cache_dtype: torch.dtype, q_dtype: torch.dtype):
    """:data:`Job` -> the tiles' rows of ``out``; seconds to compile, once a machine."""
    dtype, q_storage = native.STORAGE[cache_dtype], native.STORAGE[q_dtype]
    size, q_size = dtype.itemsize, q_storage.itemsize
    is_dot = _is_dot(cache_dtype, q_dtype)
    # Dims of a token's key that lie side by side.
    pack = 2 if cache_dtype == torch.bfloat16 else 1
    version = native.VERSION

    @numba.cfunc(_SIGNATURE, **OPTIONS)
    def attend(pointer):
        job = numba.carray(pointer, 1)[0]
        if version == 0:
            return
        head_size, group = job.head_size, job.num_heads // job.num_kv_heads
        block_size = job.block_size
        tiles = array(job.tiles, (job.num_tiles, 4), np.int64)
        caches = array(job.caches, job.num_kv_heads, np.int64)
        head_kinds = array(job.head_kinds, job.num_kv_heads, np.int64)
        kinds = array(job.kinds, (job.num_kinds, 4), np.int64)
        turns = array(job.turns, (job.num_kinds, 2), np.int64)
        all_rows = job.max_queries * group
        # This thread's memory.
        at_scores = job.scratch + take(job.threads, 1) * job.scratch_bytes
        at_sums = at_scores + 4 * all_rows * PITCH
        at_query = at_sums + 4 * all_rows * head_size
        at_turned = at_query + 4 * all_rows * head_size
        at_bits = at_turned + 4 * all_rows * head_size
        at_tops = at_bits + 2 * all_rows * head_size
        scores = array(at_scores, (all_rows, PITCH), np.float32)
        sums = array(at_sums, (all_rows, head_size), np.float32)
        query = array(at_query, (all_rows, head_size), np.float32)
        turned = array(at_turned, (all_rows, head_size), np.float32)
        bits = array(at_bits, (all_rows, head_size), np.uint16)
        tops = array(at_tops, all_rows, np.float32)
        totals = array(at_tops + 4 * all_rows, all_rows, np.float32)
        peaks = array(at_tops + 8 * all_rows, all_rows, np.float32)
        part_floats = all_rows * (head_size + 2)
        num_items = job.num_tiles * job.num_kv_heads * job.max_parts
        while True:
            item = take(pointer, 1)
            if item >= num_items:
                break
            i_part = item % job.max_parts
            i_head = item // job.max_parts % job.num_kv_heads
            i_tile = item // (job.max_parts * job.num_kv_heads)
            row, count, request = tiles[i_tile, 0], tiles[i_tile, 1], tiles[i_tile, 2]
            position = tiles[i_tile, 3]
            last = position + count - 1
            i_kind = head_kinds[i_head]
            num_sink_tokens, window_size = kinds[i_kind, SINKS], kinds[i_kind, WINDOW]
            low = max(0, position - window_size + 1)
            first_block = low // block_size
            num_parts = (last // block_size - first_block) // job.part_blocks + 1
            if i_part >= num_parts:
                continue
            blocks = array(
                kinds[i_kind, TABLE] + 4 * request * kinds[i_kind, STRIDE],
                kinds[i_kind, STRIDE],
                np.int32,
            )
            num_rows = count * group
            at_head = i_head * group
            for t in range(count):
                own = array(
                    job.q + q_size * ((row + t) * job.q_stride + at_head * head_size),
                    (group, head_size),
                    q_storage,
                )
                for g in range(group):
                    _copy(own[g], query[t * group + g], bits[t * group + g])
            tops[:num_rows] = -np.inf
            totals[:num_rows] = 0.0
            sums[:num_rows] = 0.0
            options = (
                count,
                group,
                np.float32(job.scale),
                np.float32(job.soft_cap),
            )
            cache = (caches[i_head], job.block_bytes, block_size, head_size, blocks)
            state = (scores, sums, tops, totals, peaks)
            num_sinks = min(num_sink_tokens, last - window_size + 1)
            if i_part == 0 and num_sinks > 0:
                cos, sin = turns[i_kind, COS], turns[i_kind, SIN]
                for t in range(count):
                    half = job.half
                    if not cos or position + t < num_sink_tokens + window_size:
                        half = 0
                    _turn(
                        query[t * group : (t + 1) * group],
                        array(cos + 4 * (row + t) * half, half, np.float32),
                        array(sin + 4 * (row + t) * half, half, np.float32),
                        job.is_neox != 0,
                        turned[t * group : (t + 1) * group],
                    )
                for first in range(0, num_sinks, KEYS):
                    end = min(first + KEYS, num_sinks)
                    seen = (first, end, 0, 0, position - window_size + 1)
                    span(
                        dtype,
                        dtype,
                        pack,
                        size,
                        False,
                        at_turned,
                        4 * head_size,
                        seen,
                        options,
                        cache,
                        state,
                    )
            begin = max(low, (first_block + i_part * job.part_blocks) * block_size)
            end = min(
                last + 1, (first_block + (i_part + 1) * job.part_blocks) * block_size
            )
            first = begin // LANES * LANES
            # All queries see [inner, outer): taken by itself, at full speed.
            inner, outer = first, end
            if num_rows > ROWS:
                inner = max(first, (last - window_size + LANES) // LANES * LANES)
                outer = max(inner, (position + 1) // LANES * LANES)
            while first < end:
                stop = min(first + KEYS, end)
                if first < inner:
                    stop = min(stop, inner)
                elif first < outer:
                    stop = min(stop, outer)
                seen = (first, stop, position - window_size + 1, 1, position + 1)
                first = stop
                span(
                    dtype,
                    q_storage,
                    pack,
                    size,
                    True,
                    at_bits if is_dot else at_query,
                    (2 if is_dot else 4) * head_size,
                    seen,
                    options,
                    cache,
                    state,
                )
            if num_parts > 1:
                parts = (i_tile * job.num_kv_heads + i_head) * job.max_parts
                at_parts = job.partial + 4 * parts * part_floats
                own = array(
                    at_parts + 4 * i_part * part_floats,
                    (all_rows, head_size + 2),
                    np.float32,
                )
                for r in range(num_rows):
                    own[r, :head_size] = sums[r]
                    own[r, head_size] = tops[r]
                    own[r, head_size + 1] = totals[r]
                done = job.num_done + 8 * (i_tile * job.num_kv_heads + i_head)
                if take(done, 1) < num_parts - 1:
                    continue
                take(done, -num_parts)
                merge(
                    array(at_parts, (num_parts, all_rows, head_size + 2), np.float32),
                    sums[:num_rows],
                    tops,
                    totals,
                )
            if job.sink_logits:
                logits = array(job.sink_logits + 4 * at_head, group, np.float32)
                add_logits(logits, sums[:num_rows], tops, totals)
            for t in range(count):
                to = array(
                    job.out
                    + q_size * ((row + t) * job.out_stride + at_head * head_size),
                    (group, head_size),
                    q_storage,
                )
                for g in range(group):
                    m = t * group + g
                    inverse = np.float32(1.0) / totals[m]
                    for d in range(head_size):
                        put(to[g], d, sums[m, d] * inverse)

    return attend


@numba.njit(**OPTIONS)
def _copy(own, query, bits):
    """A query [D] as float32 and, for pairs of bfloat16, as it is."""
    for d in range(own.shape[0]):
        query[d] = at(own, d)
    _copy_bits(own, bits)


def _copy_bits(own, bits):
    raise NotImplementedError("compiled code only")


@overload(_copy_bits)
def _copy_bits_of(own, bits):
    if own.dtype != types.uint16:
        return lambda own, bits: None

    def copy(own, bits):
        for d in range(own.shape[0]):
            bits[d] = own[d]

    return copy


@numba.njit(**OPTIONS)
def _turn(query, cos, sin, is_neox, result):
    """Heads [G, D] turned by angles [rotary_dim/2]; none leaves them as they are."""
    half = cos.shape[0]
    result[:] = query
    for i in range(half):
        a = i if is_neox else 2 * i
        b = i + half if is_neox else 2 * i + 1
        for g in range(query.shape[0]):
            result[g, a] = query[g, a] * cos[i] - query[g, b] * sin[i]
            result[g, b] = query[g, b] * cos[i] + query[g, a] * sin[i]
