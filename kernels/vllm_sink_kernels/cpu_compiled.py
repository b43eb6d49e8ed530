"""The CPU path's two loops that torch has no operator for, compiled by Numba.

:func:`decode` reads the retained keys where they are: gathering them for one
query would cost several times the attention itself. :func:`merge_sinks` adds the
sinks to a window's attention. Numba is a dependency of vLLM; its OpenMP layer
asks for ``libgomp.so.1`` and gets torch's, so both share one pool of threads.

Shape letters: T query tokens, R requests, HQ query heads, HKV KV heads, D head
size, N block size, B blocks, G = HQ / HKV, P splits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

# Keys of one work item. Small enough to balance two threads over one request of
# a few KV heads, large enough for the merge not to show.
SPLIT_KEYS = 128


@dataclass(frozen=True)
class Rows:
    """Query rows of a step and what they look at, for all layers.

    Args:
        rows: [T] int64, the queries' rows among the step's tokens.
        requests: [T] int64, their rows of the block table.
        positions: [T] int64.
        block_table: [R, max_blocks] int32; the gap's entries are not read.
        num_sink_tokens: S. window_size: W, the query's own included.
    """

    rows: np.ndarray
    requests: np.ndarray
    positions: np.ndarray
    block_table: np.ndarray
    num_sink_tokens: int
    window_size: int

    @functools.cached_property  # once a step, not once a layer
    def num_splits(self) -> int:
        keys = min(
            int(self.positions.max()) + 1, self.num_sink_tokens + self.window_size
        )
        return -(-keys // SPLIT_KEYS)


def decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: Rows,
    out: torch.Tensor,
    *,
    scale: float,
    turn: tuple[torch.Tensor, torch.Tensor, bool] | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of the plan's rows, written into ``out`` in place.

    Args:
        q, out: [T, HQ, D], the step's tokens.
        kv_cache: [B, HKV, 2N, D] float32, bfloat16 or float16: a block's N keys,
            then its N values.
        turn: cos and sin [T, rotary_dim/2] of the step's tokens and is_neox;
            None leaves the query as it is.
        scale, soft_cap, sink_logits: As in :func:`cpu.attend`.
    """
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    result = out
    if out.dtype != torch.float32 or not out.is_contiguous():
        result = torch.empty(out.shape)
    _decode(
        q.float().contiguous().numpy(),
        kv_cache.view(_STORAGE[kv_cache.dtype]).numpy(),
        plan.rows,
        plan.requests,
        plan.positions,
        plan.block_table,
        plan.num_sink_tokens,
        plan.window_size,
        plan.num_splits,
        scale,
        soft_cap,
        *_angles(turn),
        _logits(sink_logits),
        result.numpy(),
    )
    if result is not out:
        rows = torch.from_numpy(plan.rows)
        out[rows] = result[rows].to(out.dtype)


def merge_sinks(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: Rows,
    lse: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    turn: tuple[torch.Tensor, torch.Tensor, bool] | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Add the sinks that have left the window to a window's attention, in place.

    A query at p has the sinks ``k <= p - W`` outside its window; those inside
    are at their true distance and belong to ``out`` already.

    Args:
        q: [T, HQ, D] float32, unscaled, the step's tokens.
        lse: [T, HQ] float32, the log of the window's softmax denominator.
        out: [T, HQ, D] float32, normalised; the plan's rows are changed.
        kv_cache, turn, scale, soft_cap, sink_logits: As in :func:`decode`.
    """
    _use_torch_threads()
    _merge_sinks(
        q.contiguous().numpy(),
        kv_cache.view(_STORAGE[kv_cache.dtype]).numpy(),
        plan.rows,
        plan.requests,
        plan.positions,
        plan.block_table,
        plan.num_sink_tokens,
        plan.window_size,
        scale,
        soft_cap,
        *_angles(turn),
        _logits(sink_logits),
        lse.numpy(),
        out.numpy(),
    )


def write_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """:func:`cpu.write_kv` for keys and values of the cache's dtype."""
    storage = _STORAGE[kv_cache.dtype]
    arrays = (key.contiguous(), value.contiguous(), kv_cache)
    _write_kv(*(x.view(storage).numpy() for x in arrays), slots.numpy())


def compile_for(dtype: torch.dtype) -> None:
    """Compile the loops for a cache dtype now; seconds once a machine."""
    kv_cache, q = torch.zeros(1, 1, 2, 1, dtype=dtype), torch.zeros(1, 1, 1)
    zero = np.zeros(1, np.int64)
    plan = Rows(zero, zero, zero, np.zeros((1, 1), np.int32), 0, 1)
    write_kv(q.to(dtype), q.to(dtype), kv_cache, torch.zeros(1, dtype=torch.int64))
    decode(q, kv_cache, plan, torch.empty_like(q), scale=1.0)
    merge_sinks(q, kv_cache, plan, q[0], torch.empty_like(q), scale=1.0)


def _use_torch_threads() -> None:
    _start_threads()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@functools.cache
def _start_threads() -> None:
    """Start Numba's threads and leave torch's number of threads as it is.

    Numba calls ``omp_set_num_threads(NUMBA_NUM_THREADS)`` once, in the runtime
    that torch uses too: all cores, whatever torch was told before.
    """
    num_threads = torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(num_threads)


def _angles(turn):
    if turn is None:
        return _NO_ANGLES, _NO_ANGLES, True
    return turn[0].numpy(), turn[1].numpy(), turn[2]


def _logits(sink_logits):
    return _NO_LOGITS if sink_logits is None else sink_logits.float().numpy()


# Numba has no 16-bit floats: their bits travel as integers of two types.
_STORAGE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}
_NO_ANGLES = np.empty((0, 0), np.float32)
_NO_LOGITS = np.empty(0, np.float32)

# Every array comes in one type and layout, which :func:`compile_for` compiles.
# No "nnan"/"ninf": a NaN must stay one, and -inf is the empty maximum.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@intrinsic
def _float_of(typing_context, bits):
    """The float32 whose bits the int32 holds."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@intrinsic
def _float_of_half(typing_context, bits):
    """The IEEE half whose bits the int16 holds, as float32."""

    def codegen(context, builder, signature, arguments):
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, context.get_value_type(types.float32))

    return types.float32(types.int16), codegen


def _at(row, d):
    """``row[d]`` as float32, from any storage type."""
    raise NotImplementedError("compiled code only")


@overload(_at, inline="always")
def _at_of(row, d):
    if row.dtype == types.uint16:  # bfloat16: the upper half of a float32
        return lambda row, d: _float_of(np.int32(row[d]) << np.int32(16))
    if row.dtype == types.int16:
        return lambda row, d: _float_of_half(row[d])
    return lambda row, d: row[d]


@numba.njit(fastmath=_FAST, cache=True, inline="always")
def _exp(x):
    """e**x for x <= 0 in float32, 2 ulp; inlined, so that its loop is vectorised.

    The C library's is a call for each element. Cody and Waite's reduction to
    [-ln 2 / 2, ln 2 / 2], then the Taylor polynomial of degree 6.
    """
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _float_of((np.int32(n) + np.int32(127)) << np.int32(23))


@numba.njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _decode(
    q,
    kv_cache,
    rows,
    requests,
    positions,
    block_table,
    num_sink_tokens,
    window_size,
    num_splits,
    scale,
    soft_cap,
    cos,
    sin,
    is_neox,
    sink_logits,
    out,
):
    num_tokens = rows.shape[0]
    num_heads, head_size = q.shape[1], q.shape[2]
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    # Per split: head_size sums of p * v, the maximum, the sum of p.
    partial = np.empty(
        (num_tokens, num_kv_heads, num_splits, group, head_size + 2), np.float32
    )
    for item in numba.prange(num_tokens * num_kv_heads * num_splits):
        i_split = item % num_splits
        i_head = item // num_splits % num_kv_heads
        i_token = item // (num_splits * num_kv_heads)
        _split(
            q[rows[i_token], i_head * group : (i_head + 1) * group],
            kv_cache,
            i_head,
            block_table[requests[i_token]],
            positions[i_token],
            i_split,
            num_sink_tokens,
            window_size,
            scale,
            soft_cap,
            cos[rows[i_token]] if cos.shape[0] else cos[:0].ravel(),
            sin[rows[i_token]] if cos.shape[0] else cos[:0].ravel(),
            is_neox,
            partial[i_token, i_head, i_split],
        )
    for i_token in range(num_tokens):
        for i_kv in range(num_kv_heads):
            for i_group in range(group):
                head = i_kv * group + i_group
                top = -np.inf
                total = np.float32(0.0)
                if sink_logits.shape[0]:
                    top = sink_logits[head]
                    total = np.float32(1.0)
                row = out[rows[i_token], head]
                row[:] = 0.0
                for i_split in range(num_splits):
                    part = partial[i_token, i_kv, i_split, i_group]
                    part_top, part_total = part[head_size], part[head_size + 1]
                    if part_total == 0.0:
                        continue
                    new_top = max(top, part_top)
                    old = np.float32(math.exp(top - new_top))
                    new = np.float32(math.exp(part_top - new_top))
                    for d in range(head_size):
                        row[d] = row[d] * old + part[d] * new
                    total = total * old + part_total * new
                    top = new_top
                for d in range(head_size):
                    row[d] /= total


@numba.njit(fastmath=_FAST, cache=True, inline="never")
def _split(
    q,
    kv_cache,
    i_head,
    blocks,
    position,
    i_split,
    num_sink_tokens,
    window_size,
    scale,
    soft_cap,
    cos,
    sin,
    is_neox,
    partial,
):
    """One split's share of the keys: [0, num_sinks) and [low, position].

    Args:
        q: [G, D]. kv_cache: [B, HKV, 2N, D]. blocks: [max_blocks].
        partial: [G, D + 2], written: sums, maximum, total.
    """
    group, head_size = q.shape
    block_size = kv_cache.shape[2] // 2
    num_sinks = min(num_sink_tokens, position + 1)
    low = max(num_sinks, position - window_size + 1)
    num_keys = num_sinks + position + 1 - low
    first = i_split * SPLIT_KEYS
    last = min(first + SPLIT_KEYS, num_keys)
    if first >= last:
        partial[:, head_size:] = 0.0
        return
    n = last - first
    query = q * np.float32(scale)
    sink_query = query
    if first < num_sinks and cos.shape[0] and position >= num_sink_tokens + window_size:
        sink_query = _turned(query, cos, sin, is_neox)
    scores = np.empty((group, n), np.float32)
    # Runs of keys that are consecutive in one block.
    j = 0
    while j < n:
        is_sink = first + j < num_sinks
        key = first + j if is_sink else low + first + j - num_sinks
        end = num_sinks if is_sink else position + 1
        offset = key % block_size
        run = min(block_size - offset, end - key, n - j)
        page = kv_cache[blocks[key // block_size], i_head]
        queries = sink_query if is_sink else query
        fours = run - run % 4
        for i in range(0, fours, 4):
            at = offset + i
            a, b, c, e = page[at], page[at + 1], page[at + 2], page[at + 3]
            for g in range(group):
                s0 = s1 = s2 = s3 = np.float32(0.0)
                for d in range(head_size):
                    x = queries[g, d]
                    s0 += x * _at(a, d)
                    s1 += x * _at(b, d)
                    s2 += x * _at(c, d)
                    s3 += x * _at(e, d)
                scores[g, j + i] = s0
                scores[g, j + i + 1] = s1
                scores[g, j + i + 2] = s2
                scores[g, j + i + 3] = s3
        for i in range(fours, run):
            k = page[offset + i]
            for g in range(group):
                dot = np.float32(0.0)
                for d in range(head_size):
                    dot += queries[g, d] * _at(k, d)
                scores[g, j + i] = dot
        j += run
    if soft_cap > 0.0:
        cap = np.float32(soft_cap)
        for g in range(group):
            for i in range(n):
                scores[g, i] = cap * np.float32(math.tanh(scores[g, i] / cap))
    for g in range(group):
        top = scores[g, 0]
        for i in range(1, n):
            top = max(top, scores[g, i])
        total = np.float32(0.0)
        for i in range(n):
            weight = _exp(scores[g, i] - top)
            scores[g, i] = weight
            total += weight
        partial[g, head_size] = top
        partial[g, head_size + 1] = total
    partial[:, :head_size] = 0.0
    j = 0
    while j < n:
        is_sink = first + j < num_sinks
        key = first + j if is_sink else low + first + j - num_sinks
        end = num_sinks if is_sink else position + 1
        offset = key % block_size
        run = min(block_size - offset, end - key, n - j)
        page = kv_cache[blocks[key // block_size], i_head]
        fours = run - run % 4
        for i in range(0, fours, 4):
            at = block_size + offset + i
            a, b, c, e = page[at], page[at + 1], page[at + 2], page[at + 3]
            for g in range(group):
                w0, w1 = scores[g, j + i], scores[g, j + i + 1]
                w2, w3 = scores[g, j + i + 2], scores[g, j + i + 3]
                for d in range(head_size):
                    partial[g, d] += (
                        w0 * _at(a, d)
                        + w1 * _at(b, d)
                        + w2 * _at(c, d)
                        + w3 * _at(e, d)
                    )
        for i in range(fours, run):
            v = page[block_size + offset + i]
            for g in range(group):
                weight = scores[g, j + i]
                for d in range(head_size):
                    partial[g, d] += weight * _at(v, d)
        j += run


@numba.njit(cache=True)
def _write_kv(key, value, kv_cache, slots):
    block_size = kv_cache.shape[2] // 2
    for i in range(slots.shape[0]):
        if slots[i] < 0:
            continue
        block, offset = slots[i] // block_size, slots[i] % block_size
        for head in range(kv_cache.shape[1]):
            kv_cache[block, head, offset] = key[i, head]
            kv_cache[block, head, block_size + offset] = value[i, head]


@numba.njit(fastmath=_FAST, cache=True)
def _turned(query, cos, sin, is_neox):
    turned = query.copy()
    half = cos.shape[0]
    for i in range(half):
        a = i if is_neox else 2 * i
        b = i + half if is_neox else 2 * i + 1
        for g in range(query.shape[0]):
            turned[g, a] = query[g, a] * cos[i] - query[g, b] * sin[i]
            turned[g, b] = query[g, b] * cos[i] + query[g, a] * sin[i]
    return turned


@numba.njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _merge_sinks(
    q,
    kv_cache,
    rows,
    requests,
    positions,
    block_table,
    num_sink_tokens,
    window_size,
    scale,
    soft_cap,
    cos,
    sin,
    is_neox,
    sink_logits,
    lse,
    out,
):
    num_heads, head_size = q.shape[1], q.shape[2]
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    block_size = kv_cache.shape[2] // 2
    for i in numba.prange(rows.shape[0]):
        row, position = rows[i], positions[i]
        blocks = block_table[requests[i]]
        num_sinks = min(num_sink_tokens, max(position - window_size + 1, 0))
        query = q[row] * np.float32(scale)
        if cos.shape[0] and position >= num_sink_tokens + window_size:
            query = _turned(query, cos[row], sin[row], is_neox)
        for head in range(num_heads):
            # Online softmax: start from the window's part.
            top = lse[row, head]
            total = np.float32(1.0)
            result = out[row, head]
            if sink_logits.shape[0]:
                new_top = max(top, sink_logits[head])
                total = _exp(top - new_top)
                for d in range(head_size):
                    result[d] *= total
                total += _exp(sink_logits[head] - new_top)
                top = new_top
            for key in range(num_sinks):
                block, offset = blocks[key // block_size], key % block_size
                k = kv_cache[block, head // group, offset]
                v = kv_cache[block, head // group, block_size + offset]
                score = np.float32(0.0)
                for d in range(head_size):
                    score += query[head, d] * _at(k, d)
                if soft_cap > 0.0:
                    cap = np.float32(soft_cap)
                    score = cap * np.float32(math.tanh(score / cap))
                if score > top:
                    old, new = _exp(top - score), np.float32(1.0)
                    top = score
                else:
                    old, new = np.float32(1.0), _exp(score - top)
                total = total * old + new
                for d in range(head_size):
                    result[d] = result[d] * old + new * _at(v, d)
            for d in range(head_size):
                result[d] /= total
