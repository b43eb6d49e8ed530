"""A span of keys and a tile of queries: products, softmax, sums; merging parts.

Shape letters: D head size, N block size, G query heads of a KV head, M rows of a
tile (its queries times G), P parts.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import types
from numba.extending import overload

from vllm_sink_kernels.cpu import micro
from vllm_sink_kernels.cpu.micro import LANES, ROWS, exp2_sum, largest
from vllm_sink_kernels.cpu.native import OPTIONS, array, at, exp2

# Logarithms to base 2 all along: a power of two is the cheapest exponential.
LOG2_E = np.float32(math.log2(math.e))
# Keys of a softmax.
KEYS = 512
# From a row of scores to the next: a vector more, which a softmax may write.
PITCH = KEYS + LANES
# Values of a product: their page stays in the first-level cache.
VALUES = 64


def _keys_product(dtype, q_dtype, a, lda, b, ldb, c, ldc, k, rows, columns):
    """C = Q K^T, the queries in the dtype ``q_dtype``."""
    raise NotImplementedError("compiled code only")


def _turned_product(dtype, a, lda, b, ldb, c, ldc, k, rows, columns):
    """C = Q K^T, the queries in float32."""
    raise NotImplementedError("compiled code only")


def _values_product(dtype, a, lda, b, ldb, c, ldc, k, rows, columns):
    """C += P V."""
    raise NotImplementedError("compiled code only")


_PLAIN = {types.float32: "float32", types.int16: "float16", types.uint16: "bfloat16"}


def _keys_kind(dtype, q_dtype=None) -> str:
    kind = _PLAIN[dtype.dtype]
    if kind != "bfloat16":
        return kind
    is_dot = micro.HAS_DOT and q_dtype is not None and q_dtype.dtype == types.uint16
    return "dot" if is_dot else "pairs"


@overload(_keys_product)
def _keys_product_of(dtype, q_dtype, a, lda, b, ldb, c, ldc, k, rows, columns):
    run = micro.matmul(_keys_kind(dtype, q_dtype), False)
    return lambda dtype, q_dtype, a, lda, b, ldb, c, ldc, k, rows, columns: run(
        a, lda, b, ldb, c, ldc, k, rows, columns
    )


@overload(_turned_product)
def _turned_product_of(dtype, a, lda, b, ldb, c, ldc, k, rows, columns):
    run = micro.matmul(_keys_kind(dtype), False)
    return lambda dtype, a, lda, b, ldb, c, ldc, k, rows, columns: run(
        a, lda, b, ldb, c, ldc, k, rows, columns
    )


@overload(_values_product)
def _values_product_of(dtype, a, lda, b, ldb, c, ldc, k, rows, columns):
    run = micro.matmul(_PLAIN[dtype.dtype], True)
    return lambda dtype, a, lda, b, ldb, c, ldc, k, rows, columns: run(
        a, lda, b, ldb, c, ldc, k, rows, columns
    )


@numba.njit(inline="never", **OPTIONS)
def span(dtype, q_dtype, pack, size, is_window, q, lda, seen, options, cache, state):
    """Keys [first, end) added to a tile's softmax and sums.

    Args:
        dtype, q_dtype: Of the cache and of the window's queries.
        pack, size: Dims of a key side by side; bytes of a number of the cache.
        is_window: Which queries ``q`` are: the window's or the turned ones.
        q, lda: Address of row 0, bytes of a row.
        seen: first, end, low, slope, high: query t of the tile sees the keys
            [low + slope t, high + t) of these; first is a multiple of LANES.
        options: The tile's queries, G, scale, soft_cap.
        cache: Address of block 0's page, bytes of a block, N, D and the blocks.
        state: scores [M, PITCH], sums [M, D], tops [M] (to base 2), totals [M],
            changed; room for M floats.
    """
    first, end, low, slope, high = seen
    count, group, _scale, _soft_cap = options
    address, block_bytes, block_size, head_size, blocks = cache
    scores, sums, _tops, _totals, _ = state
    at_scores, at_sums = scores.ctypes.data, sums.ctypes.data
    key_row = block_size * pack * size
    value_row = head_size * size
    at_values = block_size * value_row
    columns = head_size // LANES
    step = count
    if low + slope * (count - 1) > first or high < end:
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
            page = address + blocks[k // block_size] * block_bytes
            at_keys = page + offset * pack * size
            to = at_rows + 4 * (k - first)
            vectors = (n + LANES - 1) // LANES
            at_q, steps = q + m0 * lda, head_size // pack
            if is_window:
                _keys_product(
                    dtype,
                    q_dtype,
                    at_q,
                    lda,
                    at_keys,
                    key_row,
                    to,
                    4 * PITCH,
                    steps,
                    rows,
                    vectors,
                )
            else:
                _turned_product(
                    dtype,
                    at_q,
                    lda,
                    at_keys,
                    key_row,
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
            n = min(block_size - offset, stop - k, VALUES)
            page = address + blocks[k // block_size] * block_bytes
            at_value = page + at_values + offset * value_row
            _values_product(
                dtype,
                at_rows + 4 * (k - first),
                4 * PITCH,
                at_value,
                value_row,
                at_sums + 4 * m0 * head_size,
                4 * head_size,
                n,
                rows,
                columns,
            )
            if columns * LANES < head_size:
                v = array(at_value, (n, head_size), dtype)
                for m in range(m0, m0 + rows):
                    for i in range(n):
                        weight = scores[m, k - first + i]
                        for d in range(columns * LANES, head_size):
                            sums[m, d] += weight * at(v[i], d)
            k += n


@numba.njit(inline="always")
def _visible(t, part):
    """Query t's first key and the one after its last, counted from key ``first``."""
    first, start, stop, low, slope, high = part
    a = min(max(start, low + slope * t), stop) - first
    b = max(a, min(stop, high + t) - first)
    return a, b


@numba.njit(inline="never", **OPTIONS)
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
    first, start, stop = part[:3]
    _, group, scale, soft_cap = options
    scores, sums, tops, totals, peaks = state
    at_scores = scores.ctypes.data
    inner = scale * LOG2_E
    if soft_cap > 0.0:
        twice = np.float32(-2.0) * inner / soft_cap
        inner = LOG2_E
    for m in range(m0, m1):
        a, b = _visible(m // group, part)
        if a == b:
            continue
        row = scores[m]
        if soft_cap > 0.0:
            for i in range(a, b):  # tanh
                x = row[i]
                e = exp2(twice * abs(x))
                y = soft_cap * (np.float32(1.0) - e) / (np.float32(1.0) + e)
                row[i] = y if x >= np.float32(0.0) else -y
        count = (b - a + LANES - 1) // LANES
        for i in range(b, a + count * LANES):
            row[i] = -np.inf
        peaks[m] = inner * largest(at_scores + 4 * (m * PITCH + a), count)
    for m in range(m0, m1):
        a, b = _visible(m // group, part)
        row = scores[m]
        if a < b:
            count = (b - a + LANES - 1) // LANES
            at_row = at_scores + 4 * (m * PITCH + a)
            top = max(tops[m], peaks[m])
            total = exp2_sum(at_row, count, inner, top)
            if totals[m] != np.float32(0.0):
                old = exp2(tops[m] - top)
                total += totals[m] * old
                if old != np.float32(1.0):
                    for d in range(head_size):
                        sums[m, d] *= old
            tops[m], totals[m] = top, total
        for i in range(start - first, a):
            row[i] = 0.0
        for i in range(b, stop - first):
            row[i] = 0.0


@numba.njit(**OPTIONS)
def merge(partial, sums, tops, totals):
    """Parts [P, M, D + 2] -> sums [M, D], tops, totals [M]."""
    num_rows, head_size = sums.shape
    for m in range(num_rows):
        top, total = np.float32(-np.inf), np.float32(0.0)
        sums[m] = 0.0
        for i_part in range(partial.shape[0]):
            part = partial[i_part, m]
            part_top, part_total = part[head_size], part[head_size + 1]
            if part_total == 0.0:
                continue
            new_top = max(top, part_top)
            old = exp2(top - new_top)
            new = exp2(part_top - new_top)
            for d in range(head_size):
                sums[m, d] = sums[m, d] * old + part[d] * new
            total = total * old + part_total * new
            top = new_top
        tops[m], totals[m] = top, total


@numba.njit(**OPTIONS)
def add_logits(logits, sums, tops, totals):
    """The learned logit of each head [G] in the denominators."""
    for m in range(sums.shape[0]):
        logit = LOG2_E * logits[m % logits.shape[0]]
        top = max(tops[m], logit)
        old = exp2(tops[m] - top)
        for d in range(sums.shape[1]):
            sums[m, d] *= old
        totals[m] = totals[m] * old + exp2(logit - top)
