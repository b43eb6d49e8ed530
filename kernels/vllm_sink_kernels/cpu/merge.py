"""The sinks that have left a window, added to the window's attention.

Shape letters: T query tokens, HQ query heads, HKV KV heads, D head size, N block
size, B blocks, G = HQ / HKV.
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

Job, _SIGNATURE = native.job_type("MergeJob", FIELDS + "q out lse", "scale soft_cap")


def merge_sinks(
    q: torch.Tensor,
    caches: HeadCaches,
    plan: Rows,
    lse: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    turns: Turns | None = None,
    soft_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Add the sinks that have left the window to a window's attention, in place.

    A query at p has the sinks ``k <= p - W`` outside its window; those inside
    are at their true distance and belong to ``out`` already.

    Args:
        q: [T, HQ, D] float32, contiguous, unscaled, the step's tokens.
        lse: [T, HQ] float32, the log of the window's softmax denominator.
        out: [T, HQ, D] float32, contiguous, normalised; the plan's rows change.
        caches, turns, scale, soft_cap, sink_logits: As in :func:`decode`.
    """
    for x in (q, out, lse):
        assert x.is_contiguous() and x.dtype == torch.float32, (x.stride(), x.dtype)
    job = plan.job(Job, caches, q.shape[1], turns, sink_logits)
    job.q, job.out, job.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
    job.scale, job.soft_cap = scale, soft_cap
    native.run(loop(caches.dtype), job, torch.get_num_threads())


@functools.cache
def loop(kv_cache_dtype: torch.dtype):
    """:data:`Job` -> the plan's rows of ``out``, an item a KV head of a row."""
    dtype = native.STORAGE[kv_cache_dtype]

    @numba.cfunc(_SIGNATURE, **OPTIONS)
    def merge(pointer):
        job = numba.carray(pointer, 1)[0]
        head_size, group = job.head_size, job.num_heads // job.num_kv_heads
        page_shape = (2 * job.block_size, head_size)
        rows = array(job.rows, job.num_tokens, np.int64)
        requests = array(job.requests, job.num_tokens, np.int64)
        positions = array(job.positions, job.num_tokens, np.int64)
        caches = array(job.caches, job.num_kv_heads, np.int64)
        head_kinds = array(job.head_kinds, job.num_kv_heads, np.int64)
        kinds = array(job.kinds, (job.num_kinds, 4), np.int64)
        turns = array(job.turns, (job.num_kinds, 2), np.int64)
        while True:
            item = take(pointer, 1)
            if item >= job.num_tokens * job.num_kv_heads:
                break
            i, i_head = item // job.num_kv_heads, item % job.num_kv_heads
            row, position = rows[i], positions[i]
            i_kind = head_kinds[i_head]
            num_sink_tokens, window_size = kinds[i_kind, SINKS], kinds[i_kind, WINDOW]
            cos = sin = half = 0
            if job.half and position >= num_sink_tokens + window_size:
                cos, sin = turns[i_kind, COS], turns[i_kind, SIN]
                half = job.half if cos else 0
            at_head = row * job.num_heads + i_head * group
            _merge_head(
                array(job.q + 4 * at_head * head_size, (group, head_size), np.float32),
                caches[i_head],
                job.block_bytes,
                page_shape,
                dtype,
                array(
                    kinds[i_kind, TABLE] + 4 * requests[i] * kinds[i_kind, STRIDE],
                    kinds[i_kind, STRIDE],
                    np.int32,
                ),
                min(num_sink_tokens, max(position - window_size + 1, 0)),
                np.float32(job.scale),
                np.float32(job.soft_cap),
                array(cos + 4 * row * half, half, np.float32),
                array(sin + 4 * row * half, half, np.float32),
                job.is_neox != 0,
                array(
                    job.sink_logits + 4 * i_head * group,
                    group if job.sink_logits else 0,
                    np.float32,
                ),
                array(job.lse + 4 * at_head, group, np.float32),
                array(
                    job.out + 4 * at_head * head_size, (group, head_size), np.float32
                ),
            )

    return merge


@numba.njit(inline="never", **OPTIONS)
def _merge_head(
    q,
    cache,
    block_bytes,
    page_shape,
    dtype,
    blocks,
    num_sinks,
    scale,
    soft_cap,
    cos,
    sin,
    is_neox,
    sink_logits,
    lse,
    out,
):
    """A KV head's queries: q and out [G, D], lse [G], cos and sin [half] or [0]."""
    group, head_size = q.shape
    block_size = page_shape[0] // 2
    query = q * scale
    if cos.shape[0]:
        query = turned(query, cos, sin, is_neox)
    for head in range(group):
        # Online softmax: start from the window's part.
        top = lse[head]
        total = np.float32(1.0)
        result = out[head]
        if sink_logits.shape[0]:
            new_top = max(top, sink_logits[head])
            total = exp(top - new_top)
            for d in range(head_size):
                result[d] *= total
            total += exp(sink_logits[head] - new_top)
            top = new_top
        for key in range(num_sinks):
            block, offset = blocks[key // block_size], key % block_size
            page = array(cache + block * block_bytes, page_shape, dtype)
            k, v = page[offset], page[block_size + offset]
            score = np.float32(0.0)
            for d in range(head_size):
                score += query[head, d] * at(k, d)
            if soft_cap > 0.0:
                score = soft_cap * np.float32(math.tanh(score / soft_cap))
            if score > top:
                old, new = exp(top - score), np.float32(1.0)
                top = score
            else:
                old, new = np.float32(1.0), exp(score - top)
            total = total * old + new
            for d in range(head_size):
                result[d] = result[d] * old + new * at(v, d)
        for d in range(head_size):
            result[d] /= total
