"""Attention of short queries (decode, speculation), reading the keys in place.

Gathering the retained keys for one query would cost several times the attention
itself. An item of work is :data:`SPLIT_KEYS` keys of one KV head for one query;
whichever thread finishes a head's last split merges them (flash-decoding, Dao
et al. 2023).

Shape letters: T query tokens, R requests, HQ query heads, HKV KV heads, D head
size, N block size, B blocks, G = HQ / HKV, P splits.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np
import torch

from vllm_sink_kernels.cpu import native
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.native import OPTIONS, array, at, exp, take, turned
from vllm_sink_kernels.cpu.rows import (
    COS,
    FIELDS,
    SIN,
    SINKS,
    STRIDE,
    TABLE,
    WINDOW,
    Rows,
    Turns,
)

# Keys of one work item. Small enough to balance two threads over one request of
# a few KV heads, large enough for the merge not to show.
SPLIT_KEYS = 128
# Floats of keys and values up to which one thread is as fast as two, of which the
# other has to wake (SmolLM2-135M on two cores: up to 170 keys).
SERIAL_FLOATS = 64 * 1024

Job, _SIGNATURE = native.job_type(
    "DecodeJob",
    FIELDS + "q q_stride out out_stride num_splits partial num_done",
    "scale soft_cap",
)


def decode(
    q: torch.Tensor,
    caches: HeadCaches,
    plan: Rows,
    out: torch.Tensor,
    *,
    scale: float,
    turns: Turns | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of the plan's rows, written into ``out`` in place: one call a layer.

    Args:
        q, out: [T, HQ, D], the step's tokens.
        caches: The layer's; its heads may be of several kinds.
        turns: The sink turn of the step's tokens; None leaves the query as it is.
        scale, soft_cap, sink_logits: As in :func:`cpu.attend`.
    """
    if not _is_float_rows(q):
        q = q.float().contiguous()
    result = out if _is_float_rows(out) else torch.empty(out.shape)
    _, num_heads, head_size = q.shape
    job = plan.job(Job, caches, num_heads, turns, sink_logits)
    job.q, job.q_stride = q.data_ptr(), q.stride(0)
    job.out, job.out_stride = result.data_ptr(), result.stride(0)
    job.scale, job.soft_cap = scale, soft_cap
    keys = [plan.max_keys[kind] for kind in caches.kinds]
    job.num_splits = -(-max(keys) // SPLIT_KEYS)
    num_parts = job.num_tokens * job.num_splits
    job.partial = plan.zeros(
        "partial", num_parts * num_heads * (head_size + 2), np.float32
    )
    job.num_done = plan.zeros("done", job.num_tokens * caches.num_heads, np.int64)
    num_floats = 2 * job.num_tokens * sum(keys) * head_size
    num_threads = torch.get_num_threads() if num_floats > SERIAL_FLOATS else 1
    native.run(loop(caches.dtype), job, num_threads)
    if result is not out:
        rows = torch.from_numpy(plan.rows)
        out[rows] = result[rows].to(out.dtype)


def _is_float_rows(x: torch.Tensor) -> bool:
    """Whether a token's [heads, D] are consecutive float32 numbers."""
    return x.dtype == torch.float32 and x.stride()[1:] == (x.shape[2], 1)


@functools.cache
def loop(kv_cache_dtype: torch.dtype):
    """:data:`Job` -> the plan's rows of ``out``; seconds to compile, once a machine."""
    dtype = native.STORAGE[kv_cache_dtype]

    @numba.cfunc(_SIGNATURE, **OPTIONS)
    def attend(pointer):
        job = numba.carray(pointer, 1)[0]
        head_size, group = job.head_size, job.num_heads // job.num_kv_heads
        rows = array(job.rows, job.num_tokens, np.int64)
        requests = array(job.requests, job.num_tokens, np.int64)
        positions = array(job.positions, job.num_tokens, np.int64)
        caches = array(job.caches, job.num_kv_heads, np.int64)
        head_kinds = array(job.head_kinds, job.num_kv_heads, np.int64)
        kinds = array(job.kinds, (job.num_kinds, 4), np.int64)
        turns = array(job.turns, (job.num_kinds, 2), np.int64)
        shape = (job.num_tokens, job.num_kv_heads, job.num_splits, group, head_size + 2)
        partial = array(job.partial, shape, np.float32)
        page_shape = (2 * job.block_size, head_size)
        num_items = job.num_tokens * job.num_kv_heads * job.num_splits
        while True:
            item = take(pointer, 1)
            if item >= num_items:
                break
            i_split = item % job.num_splits
            i_head = item // job.num_splits % job.num_kv_heads
            i_token = item // (job.num_splits * job.num_kv_heads)
            row, position = rows[i_token], positions[i_token]
            at_head = i_head * group * head_size
            q = array(
                job.q + 4 * (row * job.q_stride + at_head),
                (group, head_size),
                np.float32,
            )
            i_kind = head_kinds[i_head]
            num_sink_tokens, window_size = kinds[i_kind, SINKS], kinds[i_kind, WINDOW]
            cos = sin = half = 0
            if job.half and position >= num_sink_tokens + window_size:
                cos, sin = turns[i_kind, COS], turns[i_kind, SIN]
                half = job.half if cos else 0
            blocks = array(
                kinds[i_kind, TABLE] + 4 * requests[i_token] * kinds[i_kind, STRIDE],
                kinds[i_kind, STRIDE],
                np.int32,
            )
            _split(
                q,
                caches[i_head],
                job.block_bytes,
                page_shape,
                dtype,
                blocks,
                position,
                i_split,
                num_sink_tokens,
                window_size,
                job.scale,
                job.soft_cap,
                array(cos + 4 * row * half, half, np.float32),
                array(sin + 4 * row * half, half, np.float32),
                job.is_neox != 0,
                partial[i_token, i_head, i_split],
            )
            done = job.num_done + 8 * (i_token * job.num_kv_heads + i_head)
            if take(done, 1) < job.num_splits - 1:
                continue
            take(done, -job.num_splits)
            out = array(
                job.out + 4 * (row * job.out_stride + at_head),
                (group, head_size),
                np.float32,
            )
            logits = array(
                job.sink_logits + 4 * i_head * group,
                group if job.sink_logits else 0,
                np.float32,
            )
            _merge(partial[i_token, i_head], logits, out)

    return attend


@numba.njit(**OPTIONS)
def _merge(partial, sink_logits, out):
    """Splits [P, G, D + 2] -> out [G, D]; sink_logits [G] or empty."""
    num_splits, group, head_size = partial.shape[0], out.shape[0], out.shape[1]
    for g in range(group):
        row = out[g]
        row[:] = 0.0
        top, total = np.float32(-np.inf), np.float32(0.0)
        if sink_logits.shape[0]:
            top, total = sink_logits[g], np.float32(1.0)
        for i_split in range(num_splits):
            part = partial[i_split, g]
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


# Inlined by Numba: left to LLVM, a query of 1,000 keys takes up to a tenth longer.
@numba.njit(inline="always")
def _run(i, last, num_sinks, low, position, block_size):
    """The keys that follow key ``i`` of a query in one block, up to key ``last``.

    Returns:
        The block's index in the block table, the first key's place in the block
        and the number of keys.
    """
    key, end = (i, num_sinks) if i < num_sinks else (low + i - num_sinks, position + 1)
    offset = key % block_size
    return key // block_size, offset, min(block_size - offset, end - key, last - i)


@numba.njit(inline="never", **OPTIONS)
def _split(
    q,
    cache,
    block_bytes,
    page_shape,
    dtype,
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
        q: [G, D]. cache: Address of block 0's page of this head, [2N, D].
        cos, sin: [rotary_dim/2], or [0] for a query that is not turned.
        partial: [G, D + 2], written: sums of p * v, maximum, sum of p.
    """
    group, head_size = q.shape
    block_size = page_shape[0] // 2
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
    if first < num_sinks and cos.shape[0]:
        sink_query = turned(query, cos, sin, is_neox)
    scores = np.empty((group, n), np.float32)
    j = 0
    while j < n:
        i_block, offset, run = _run(
            first + j, last, num_sinks, low, position, block_size
        )
        page = array(cache + blocks[i_block] * block_bytes, page_shape, dtype)
        queries = sink_query if first + j < num_sinks else query
        fours = run - run % 4
        for i in range(0, fours, 4):
            at_key = offset + i
            a, b, c, e = (
                page[at_key],
                page[at_key + 1],
                page[at_key + 2],
                page[at_key + 3],
            )
            for g in range(group):
                s0 = s1 = s2 = s3 = np.float32(0.0)
                for d in range(head_size):
                    x = queries[g, d]
                    s0 += x * at(a, d)
                    s1 += x * at(b, d)
                    s2 += x * at(c, d)
                    s3 += x * at(e, d)
                scores[g, j + i] = s0
                scores[g, j + i + 1] = s1
                scores[g, j + i + 2] = s2
                scores[g, j + i + 3] = s3
        for i in range(fours, run):
            k = page[offset + i]
            for g in range(group):
                dot = np.float32(0.0)
                for d in range(head_size):
                    dot += queries[g, d] * at(k, d)
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
            weight = exp(scores[g, i] - top)
            scores[g, i] = weight
            total += weight
        partial[g, head_size] = top
        partial[g, head_size + 1] = total
    partial[:, :head_size] = 0.0
    j = 0
    while j < n:
        i_block, offset, run = _run(
            first + j, last, num_sinks, low, position, block_size
        )
        page = array(cache + blocks[i_block] * block_bytes, page_shape, dtype)
        fours = run - run % 4
        for i in range(0, fours, 4):
            at_key = block_size + offset + i
            a, b, c, e = (
                page[at_key],
                page[at_key + 1],
                page[at_key + 2],
                page[at_key + 3],
            )
            for g in range(group):
                w0, w1 = scores[g, j + i], scores[g, j + i + 1]
                w2, w3 = scores[g, j + i + 2], scores[g, j + i + 3]
                for d in range(head_size):
                    partial[g, d] += (
                        w0 * at(a, d) + w1 * at(b, d) + w2 * at(c, d) + w3 * at(e, d)
                    )
        for i in range(fours, run):
            v = page[block_size + offset + i]
            for g in range(group):
                weight = scores[g, j + i]
                for d in range(head_size):
                    partial[g, d] += weight * at(v, d)
        j += run
