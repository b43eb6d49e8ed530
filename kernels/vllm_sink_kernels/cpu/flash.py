"""The loop of the CPU path: attention of tiles of queries, the keys read in place.

A tile is some consecutive queries of one request; an item of work is a tile, a KV
head and a part of its keys (flash attention, Dao et al. 2022; the parts as in
flash-decoding, 2023). Keys that have left the window, the sinks, meet the turned
query; the rest meet the query as it is. A tile's keys are taken :data:`KEYS` at a
time: products with all its queries, their softmax, products with the values. Where
a span is only partly visible, at the edges of the window, it is taken for a few
queries at a time and only from the first key that one of them sees to the last.
Nothing but the products of whole vectors at those ends is computed in vain. Where AMX
multiplies (:mod:`amx`), all of a tile's queries are taken at once, at the edges, too.

Whichever thread finishes a head's last part merges them, in the parts' order.

Shape letters: T query tokens, HQ query heads, HKV KV heads, D head size, N block
size, G = HQ / HKV, M rows of a tile (its queries times G), P parts.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch

from vllm_sink_kernels.cpu import micro, native
from vllm_sink_kernels.cpu.amx import NONE, SIDE, TOKENS, begin_tiles, end_tiles
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.layouts import OWN, PLAIN
from vllm_sink_kernels.cpu.micro import LANES, ROWS
from vllm_sink_kernels.cpu.native import OPTIONS, at, put, take
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
from vllm_sink_kernels.cpu.span import F32, KEYS, PITCH, add_logits, merge, span

# Floats of keys and values up to which one thread is as fast as two, of which the
# other has to wake (SmolLM2-135M on two cores: up to 170 keys).
SERIAL_FLOATS = 64 * 1024
# Up to so many queries no product is in AMX's tiles: decode and speculation are bound
# by memory.
FEW_QUERIES = 8
# What the configuration of AMX's tiles takes.
TILES_BYTES = 64
I64 = np.int64

Job, _SIGNATURE = native.job_type(
    "FlashJob",
    FIELDS + "q q_stride out out_stride max_parts partial "
    "num_done threads scratch scratch_bytes scratch_rows room_bytes",
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
    kind: int = NONE,
    in_tiles: bool = True,
) -> None:
    """Attention of the tiles' queries, written into ``out``: one call a layer.

    Args:
        q, out: [T, HQ, D], the step's tokens, of one dtype.
        caches: The layer's; its heads may be of several kinds.
        turns: The sink turn of the step's tokens; None leaves the query as it is.
        scale, soft_cap, sink_logits: As in :func:`.attention.attend`.
        kind: What can multiply in tiles, of :mod:`amx`.
        in_tiles: Whether it does.
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
    rows, job.room_bytes = size.num_rows, 0
    if kind != NONE and in_tiles and tiles.max_queries > FEW_QUERIES:
        rows, job.room_bytes = -(-rows // SIDE) * SIDE, 2 * TOKENS * head_size
    job.scratch_rows = rows
    # q twice, its bits, scores, sums; a row's maximum, denominator and peak.
    floats = rows * (3 * head_size + head_size // 2 + PITCH + 3) + 8 * LANES
    floats += (TILES_BYTES + job.room_bytes) // 4
    job.scratch_bytes = -(-4 * floats // 64) * 64
    job.scratch = tiles.scratch("tiles", num_threads * job.scratch_bytes)
    job.threads = tiles.counter()
    native.run(loop(caches.dtype, q.dtype, caches.layout, kind), job, num_threads)
    if result is not out:
        changed = torch.from_numpy(tiles.rows)
        out[changed] = result[changed].to(out.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x``, a token's [heads, D] consecutive."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@functools.cache
def loop(
    cache_dtype: torch.dtype,
    q_dtype: torch.dtype,
    layout: int = OWN,
    kind: int = NONE,
):
    """:data:`Job` -> the tiles' rows of ``out``; seconds to compile, once a machine."""
    dtype, q_storage = native.STORAGE[cache_dtype], native.STORAGE[q_dtype]
    size, q_size = dtype.itemsize, q_storage.itemsize
    is_paired = cache_dtype == torch.bfloat16 and layout != PLAIN
    is_dot = is_paired and micro.HAS_DOT and q_dtype == torch.bfloat16
    # Dims of a token's key that lie side by side.
    pack = 2 if is_paired else 1
    version = native.VERSION

    name = f"attend_{layout}" + (f"_{kind}" if kind != NONE else "")

    @native.compiled(_SIGNATURE, name, cache_dtype, q_dtype)
    def attend(pointer):
        job = numba.carray(pointer, 1)[0]
        if version == 0:
            return
        head_size, group = job.head_size, job.num_heads // job.num_kv_heads
        block_size = job.block_size
        all_rows = job.scratch_rows
        # This thread's memory.
        before = job.scratch + take(job.threads, 1) * job.scratch_bytes
        room = before + TILES_BYTES
        scores = room + job.room_bytes
        sums = scores + 4 * all_rows * PITCH
        query = sums + 4 * all_rows * head_size
        turned = query + 4 * all_rows * head_size
        bits = turned + 4 * all_rows * head_size
        tops = bits + 2 * all_rows * head_size
        totals = tops + 4 * all_rows
        peaks = totals + 4 * all_rows
        state = (scores, sums, tops, totals, peaks, room)
        part_floats = job.max_queries * group * (head_size + 2)
        # Where nothing multiplies in tiles, what is for them isn't compiled.
        has_tiles = False
        if kind != NONE:
            has_tiles = job.room_bytes > 0
            if has_tiles:
                begin_tiles(kind, before)
        num_items = job.num_tiles * job.num_kv_heads * job.max_parts
        while True:
            item = take(pointer, 1)
            if item >= num_items:
                break
            i_part = item % job.max_parts
            i_head = item // job.max_parts % job.num_kv_heads
            i_tile = item // (job.max_parts * job.num_kv_heads)
            tile = job.tiles + 32 * i_tile
            row, count = at(I64, tile, 0), at(I64, tile, 1)
            request, position = at(I64, tile, 2), at(I64, tile, 3)
            last = position + count - 1
            i_kind = at(I64, job.head_kinds, i_head)
            policy = job.kinds + 32 * i_kind
            num_sink_tokens = at(I64, policy, SINKS)
            window_size = at(I64, policy, WINDOW)
            low = max(0, position - window_size + 1)
            first_block = low // block_size
            num_parts = (last // block_size - first_block) // job.part_blocks + 1
            if i_part >= num_parts:
                continue
            blocks = at(I64, policy, TABLE)
            blocks += 4 * request * at(I64, policy, STRIDE)
            num_rows = count * group
            in_tiles = has_tiles and count > FEW_QUERIES
            at_head = i_head * group
            for t in range(count):
                # Read outside: a loop that reads the job is not vectorized.
                own = job.q + q_size * ((row + t) * job.q_stride + at_head * head_size)
                to = t * group * head_size
                for d in range(group * head_size):
                    x = at(q_storage, own, d)
                    put(F32, query, to + d, x)
                    if is_dot or (kind != NONE and in_tiles):
                        put(q_storage, bits, to + d, x)
            for m in range(num_rows):
                put(F32, tops, m, np.float32(-np.inf))
                put(F32, totals, m, np.float32(0.0))
            for d in range(num_rows * head_size):
                put(F32, sums, d, np.float32(0.0))
            options = (
                count,
                group,
                np.float32(job.scale),
                np.float32(job.soft_cap),
            )
            page = at(I64, job.caches, i_head)
            cache = (page, job.block_bytes, block_size, head_size, blocks)
            num_sinks = min(num_sink_tokens, last - window_size + 1)
            if i_part > 0:
                num_sinks = 0
            if num_sinks > 0:
                cos = at(I64, job.turns + 16 * i_kind, COS)
                sin = at(I64, job.turns + 16 * i_kind, SIN)
                for t in range(count):
                    half = job.half
                    if not cos or position + t < num_sink_tokens + window_size:
                        half = 0
                    at_angles = 4 * (row + t) * half
                    for g in range(t * group, (t + 1) * group):
                        _turn(
                            query + 4 * g * head_size,
                            head_size,
                            cos + at_angles,
                            sin + at_angles,
                            half,
                            job.is_neox != 0,
                            turned + 4 * g * head_size,
                        )
            begin = max(low, (first_block + i_part * job.part_blocks) * block_size)
            end = min(
                last + 1, (first_block + (i_part + 1) * job.part_blocks) * block_size
            )
            # All queries see [inner, outer): taken by itself, at full speed. Tiles
            # take what only some see as fast.
            inner, outer = begin // LANES * LANES, end
            if num_rows > ROWS and not in_tiles:
                inner = max(inner, (last - window_size + LANES) // LANES * LANES)
                outer = max(inner, (position + 1) // LANES * LANES)
            # First the sinks, then the window.
            is_window, first = num_sinks <= 0, 0
            if is_window:
                first = begin // LANES * LANES
            while not is_window or first < end:
                if is_window:
                    stop = min(first + KEYS, end)
                    if first < inner:
                        stop = min(stop, inner)
                    elif first < outer:
                        stop = min(stop, outer)
                    seen = (first, stop, position - window_size + 1, 1, position + 1)
                    at_query, lda = query, 4 * head_size
                    if is_dot or (kind != NONE and in_tiles):
                        at_query, lda = bits, 2 * head_size
                else:
                    stop = min(first + KEYS, num_sinks)
                    seen = (first, stop, 0, 0, position - window_size + 1)
                    at_query, lda = turned, 4 * head_size
                span(
                    layout,
                    dtype,
                    q_storage,
                    kind,
                    pack,
                    size,
                    is_window,
                    in_tiles and is_window,
                    at_query,
                    lda,
                    seen,
                    options,
                    cache,
                    state,
                )
                first = stop
                if not is_window and first >= num_sinks:
                    is_window, first = True, begin // LANES * LANES
            if num_parts > 1:
                parts = (i_tile * job.num_kv_heads + i_head) * job.max_parts
                at_parts = job.partial + 4 * parts * part_floats
                own = at_parts + 4 * i_part * part_floats
                for m in range(num_rows):
                    to = m * (head_size + 2)
                    for d in range(head_size):
                        put(F32, own, to + d, at(F32, sums, m * head_size + d))
                    put(F32, own, to + head_size, at(F32, tops, m))
                    put(F32, own, to + head_size + 1, at(F32, totals, m))
                done = job.num_done + 8 * (i_tile * job.num_kv_heads + i_head)
                if take(done, 1) < num_parts - 1:
                    continue
                take(done, -num_parts)
                merge(
                    at_parts,
                    num_parts,
                    part_floats,
                    num_rows,
                    head_size,
                    sums,
                    tops,
                    totals,
                )
            if job.sink_logits:
                logits = job.sink_logits + 4 * at_head
                add_logits(logits, group, num_rows, head_size, sums, tops, totals)
            for t in range(count):
                to = job.out
                to += q_size * ((row + t) * job.out_stride + at_head * head_size)
                for g in range(group):
                    m = t * group + g
                    inverse = np.float32(1.0) / at(F32, totals, m)
                    for d in range(head_size):
                        x = at(F32, sums, m * head_size + d) * inverse
                        put(q_storage, to, g * head_size + d, x)
        if kind != NONE and has_tiles:
            end_tiles(kind, before)

    return attend


@numba.njit(inline="always", **OPTIONS)
def _turn(query, head_size, cos, sin, half, is_neox, result):
    """A head [D] turned by angles [rotary_dim/2]; all are addresses.

    Args:
        half: rotary_dim/2; 0 leaves the head as it is.
    """
    for d in range(head_size):
        put(F32, result, d, at(F32, query, d))
    for i in range(half):
        a = i if is_neox else 2 * i
        b = i + half if is_neox else 2 * i + 1
        x, y = at(F32, query, a), at(F32, query, b)
        c, s = at(F32, cos, i), at(F32, sin, i)
        put(F32, result, a, x * c - y * s)
        put(F32, result, b, y * c + x * s)
