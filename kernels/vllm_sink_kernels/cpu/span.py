"""A span of keys and a tile of queries: products, softmax, sums; merging parts.

Written over addresses and inlined into the one loop that uses it: arrays and
functions of their own take Numba and LLVM several times as long to compile.

Shape letters: D head size, N block size, G query heads of a KV head, M rows of a
tile (its queries times G), P parts.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from vllm_sink_kernels.cpu.amx import NONE, TOKENS, tiled_keys, tiled_values
from vllm_sink_kernels.cpu.layouts import TILE, TILED
from vllm_sink_kernels.cpu.micro import (
    LANES,
    ROWS,
    keys_product,
    turned_product,
    values_product,
)
from vllm_sink_kernels.cpu.native import OPTIONS, at, put
from vllm_sink_kernels.cpu.vectors import exp2, exp2_sum, largest

F32 = np.float32
# Logarithms to base 2 all along: a power of two is the cheapest exponential.
LOG2_E = np.float32(math.log2(math.e))
# Keys of a softmax.
KEYS = 512
# From a row of scores to the next: a vector more, which a softmax may write.
PITCH = KEYS + LANES
# Values of a product: their page stays in the first-level cache.
VALUES = 64


@numba.njit(inline="always", **OPTIONS)
def span(
    layout,
    dtype,
    q_dtype,
    tiles,
    pack,
    size,
    is_window,
    in_tiles,
    q,
    lda,
    seen,
    options,
    cache,
    state,
):
    """Keys [first, end) added to a tile's softmax and sums.

    Args:
        layout: Of the cache's pages, of :mod:`layouts`; a constant, as the next.
        dtype, q_dtype: Of the cache and of the window's queries.
        tiles: What multiplies in tiles, of :mod:`amx`.
        pack, size: Dims of a key side by side; bytes of a number of the cache.
        is_window: Which queries ``q`` are: the window's or the turned ones.
        in_tiles: Whether the products are of whole tiles, of all rows at once; ``q``
            is then bfloat16.
        q, lda: Address of row 0, bytes of a row.
        seen: first, end, low, slope, high: query t of the tile sees the keys
            [low + slope t, high + t) of these; first is a multiple of LANES.
        options: The tile's queries, G, scale, soft_cap.
        cache: Address of block 0's page, bytes of a block, N, D and the address of
            the blocks.
        state: Addresses of scores [M, PITCH], sums [M, D], tops [M] (to base 2),
            totals [M], changed, of room for M floats and of the tiles' room.
    """
    first, end, low, slope, high = seen
    count, group, _scale, _soft_cap = options
    pages, block_bytes, block_size, head_size, blocks = cache
    at_scores, at_sums, _tops, _totals, _peaks, room = state
    key_row, key_token = block_size * pack * size, pack * size
    key_step = LANES * key_token
    value_row, value_step = head_size * size, 0
    most = TOKENS if in_tiles else VALUES
    if layout == TILED:
        key_row = value_row = TILE * 2 * size
        key_token, key_step = head_size * size, TILE * head_size * size
        value_step = TILE * block_size * size
    columns = head_size // LANES
    step = count
    if not in_tiles and (low + slope * (count - 1) > first or high < end):
        step = max(1, ROWS // group)
    for t0 in range(0, count, step):
        t1 = min(t0 + step, count)
        start, stop = max(first, low + slope * t0), min(end, high + t1 - 1)
        if start >= stop:
            continue
        m0, rows = t0 * group, (t1 - t0) * group
        at_rows = at_scores + 4 * m0 * PITCH
        k = start // LANES * LANES
        while k < stop:
            offset = k % block_size
            n = min(block_size - offset, stop - k)
            page = pages + at(np.int32, blocks, k // block_size) * block_bytes
            at_keys = page + offset * key_token  # offset is a multiple of LANES
            to = at_rows + 4 * (k - first)
            vectors = (n + LANES - 1) // LANES
            at_q, steps = q + m0 * lda, head_size // pack
            if tiles != NONE and in_tiles:
                tiled_keys(
                    tiles,
                    at_q,
                    lda,
                    at_keys,
                    key_row,
                    key_step,
                    to,
                    4 * PITCH,
                    steps,
                    rows,
                    vectors,
                )
            elif is_window:
                keys_product(
                    layout,
                    dtype,
                    q_dtype,
                    at_q,
                    lda,
                    at_keys,
                    key_row,
                    key_step,
                    to,
                    4 * PITCH,
                    steps,
                    rows,
                    vectors,
                )
            else:
                turned_product(
                    layout,
                    dtype,
                    at_q,
                    lda,
                    at_keys,
                    key_row,
                    key_step,
                    to,
                    4 * PITCH,
                    steps,
                    rows,
                    vectors,
                )
            k += n
        part = (first, start, stop, low, slope, high)
        _softmax(m0, m0 + rows, part, options, head_size, state)
        k = start
        while k < stop:
            offset = k % block_size
            n = min(block_size - offset, stop - k, most - offset % 2)
            page = pages + at(np.int32, blocks, k // block_size) * block_bytes
            values = page + block_size * head_size * size
            weights, tokens, i_row = at_rows + 4 * (k - first), n, offset
            sums = at_sums + 4 * m0 * head_size
            if tiles != NONE and in_tiles:
                tiled_values(
                    tiles,
                    layout,
                    weights,
                    4 * PITCH,
                    values,
                    value_row,
                    value_step,
                    offset,
                    n,
                    sums,
                    4 * head_size,
                    rows,
                    columns,
                    room,
                )
                k += n
                continue
            if layout == TILED:
                # Pairs of tokens. One whose other half isn't seen comes by itself: of
                # a number that isn't seen, NaN maybe, not even zero times it counts.
                if offset % 2 == 1:
                    weight = at_rows + 4 * (k - first)
                    _add_one(dtype, weight, values, offset, rows, cache, sums)
                if (offset + n) % 2 == 1:
                    weight = at_rows + 4 * (k + n - 1 - first)
                    _add_one(dtype, weight, values, offset + n - 1, rows, cache, sums)
                weights += 4 * (offset % 2)
                i_row = (offset + 1) // 2
                tokens = (offset + n) // 2 - i_row
            values_product(
                layout,
                dtype,
                weights,
                4 * PITCH,
                values + i_row * value_row,
                value_row,
                value_step,
                sums,
                4 * head_size,
                tokens,
                rows,
                columns,
            )
            if columns * LANES < head_size:  # in no tile
                for m in range(rows):
                    for i in range(n):
                        weight = at(F32, weights, m * PITCH + i)
                        for d in range(columns * LANES, head_size):
                            x = at(F32, sums, m * head_size + d)
                            x += weight * at(
                                dtype, values, (offset + i) * head_size + d
                            )
                            put(F32, sums, m * head_size + d, x)
            k += n


@numba.njit(inline="always", **OPTIONS)
def _add_one(dtype, weights, values, i, rows, cache, sums):
    """One token's values, in tiles, times a weight a row, added to the sums.

    Args:
        weights: Address of row 0's; the next is PITCH further.
        values: Address of a page's. i: The token's place in its block.
    """
    block_size, head_size = cache[2], cache[3]
    for m in range(rows):
        weight = at(F32, weights, m * PITCH)
        for first in range(0, head_size, TILE):
            place = first * block_size + i // 2 * 2 * TILE + i % 2
            for d in range(TILE):
                x = at(F32, sums, m * head_size + first + d)
                x += weight * at(dtype, values, place + 2 * d)
                put(F32, sums, m * head_size + first + d, x)


@numba.njit(inline="always")
def _visible(t, part):
    """Query t's first key and the one after its last, counted from key ``first``."""
    first, start, stop, low, slope, high = part
    a = min(max(start, low + slope * t), stop) - first
    b = max(a, min(stop, high + t) - first)
    return a, b


@numba.njit(inline="always", **OPTIONS)
def _softmax(m0, m1, part, options, head_size, state):
    """Rows' scores become weights; what was summed before is scaled down.

    All rows' maxima first: no row's exponentials wait for its own.

    Args:
        m0, m1: The rows.
        part: first, start, stop, low, slope, high: query t sees the keys [low +
            slope t, high + t) of [start, stop); the scores begin with key first.
            The others' weights become 0. The vector after the last may be written.
        options, state: As in :func:`span`.
    """
    first, start, stop, _low, _slope, _high = part
    _count, group, scale, soft_cap = options
    scores, sums, tops, totals, peaks, _room = state
    inner, twice = scale * LOG2_E, np.float32(0.0)
    if soft_cap > 0.0:
        twice = np.float32(-2.0) * inner / soft_cap
        inner = LOG2_E
    for m in range(m0, m1):
        a, b = _visible(m // group, part)
        if a == b:
            continue
        row = scores + 4 * m * PITCH
        if soft_cap > 0.0:
            for i in range(a, b):  # tanh
                x = at(F32, row, i)
                e = exp2(twice * abs(x))
                y = soft_cap * (np.float32(1.0) - e) / (np.float32(1.0) + e)
                put(F32, row, i, y if x >= np.float32(0.0) else -y)
        count = (b - a + LANES - 1) // LANES
        for i in range(b, a + count * LANES):
            put(F32, row, i, np.float32(-np.inf))
        put(F32, peaks, m, inner * largest(row + 4 * a, count))
    for m in range(m0, m1):
        a, b = _visible(m // group, part)
        row = scores + 4 * m * PITCH
        if a < b:
            count = (b - a + LANES - 1) // LANES
            before, known = at(F32, tops, m), at(F32, totals, m)
            top = max(before, at(F32, peaks, m))
            total = exp2_sum(row + 4 * a, count, inner, top)
            if known != np.float32(0.0):
                old = exp2(before - top)
                total += known * old
                if old != np.float32(1.0):
                    for d in range(m * head_size, (m + 1) * head_size):
                        put(F32, sums, d, at(F32, sums, d) * old)
            put(F32, tops, m, top)
            put(F32, totals, m, total)
        for i in range(start - first, a):
            put(F32, row, i, np.float32(0.0))
        for i in range(b, stop - first):
            put(F32, row, i, np.float32(0.0))


@numba.njit(inline="always", **OPTIONS)
def merge(partial, num_parts, part_floats, num_rows, head_size, sums, tops, totals):
    """Parts [P, M, D + 2] -> sums [M, D], tops, totals [M]; all are addresses.

    Args:
        part_floats: From a part to the next.
        num_rows: Rows that are used.
    """
    for m in range(num_rows):
        top, total = np.float32(-np.inf), np.float32(0.0)
        row = sums + 4 * m * head_size
        for d in range(head_size):
            put(F32, row, d, np.float32(0.0))
        for i_part in range(num_parts):
            part = partial + 4 * (i_part * part_floats + m * (head_size + 2))
            part_top = at(F32, part, head_size)
            part_total = at(F32, part, head_size + 1)
            if part_total == np.float32(0.0):
                continue
            new_top = max(top, part_top)
            old = exp2(top - new_top)
            new = exp2(part_top - new_top)
            for d in range(head_size):
                put(F32, row, d, at(F32, row, d) * old + at(F32, part, d) * new)
            total = total * old + part_total * new
            top = new_top
        put(F32, tops, m, top)
        put(F32, totals, m, total)


@numba.njit(inline="always", **OPTIONS)
def add_logits(logits, group, num_rows, head_size, sums, tops, totals):
    """The learned logit of each head [G] in the denominators; all are addresses."""
    for m in range(num_rows):
        logit = LOG2_E * at(F32, logits, m % group)
        before = at(F32, tops, m)
        top = max(before, logit)
        old = exp2(before - top)
        for d in range(m * head_size, (m + 1) * head_size):
            put(F32, sums, d, at(F32, sums, d) * old)
        put(F32, totals, m, at(F32, totals, m) * old + exp2(logit - top))
