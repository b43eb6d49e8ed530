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
from vllm_sink_kernels.cpu.native import OPTIONS, array, at, exp, take, turned
from vllm_sink_kernels.cpu.rows import FIELDS, Rows

Job, _SIGNATURE = native.job_type("MergeJob", FIELDS + "q out lse", "scale soft_cap")


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
        q: [T, HQ, D] float32, contiguous, unscaled, the step's tokens.
        lse: [T, HQ] float32, the log of the window's softmax denominator.
        out: [T, HQ, D] float32, contiguous, normalised; the plan's rows change.
        kv_cache, turn, scale, soft_cap, sink_logits: As in :func:`decode`.
    """
    for x in (q, out, lse):
        assert x.is_contiguous() and x.dtype == torch.float32, (x.stride(), x.dtype)
    job = plan.job(Job, kv_cache, q.shape[1], turn, sink_logits)
    job.q, job.out, job.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
    job.scale, job.soft_cap = scale, soft_cap
    native.run(loop(kv_cache.dtype), job, torch.get_num_threads())


@functools.cache
def loop(kv_cache_dtype: torch.dtype):
    """:data:`Job` -> the plan's rows of ``out``, an item a row."""
    dtype = native.STORAGE[kv_cache_dtype]
    size = dtype.itemsize

    @numba.cfunc(_SIGNATURE, **OPTIONS)
    def merge(pointer):
        job = numba.carray(pointer, 1)[0]
        heads_shape = (job.num_heads, job.head_size)
        row_bytes = 4 * job.num_heads * job.head_size
        pages_shape = (job.num_kv_heads, 2 * job.block_size, job.head_size)
        block_bytes = 2 * job.block_size * job.num_kv_heads * job.head_size * size
        rows = array(job.rows, job.num_tokens, np.int64)
        requests = array(job.requests, job.num_tokens, np.int64)
        positions = array(job.positions, job.num_tokens, np.int64)
        num_logits = job.num_heads if job.sink_logits else 0
        sink_logits = array(job.sink_logits, num_logits, np.float32)
        while True:
            i = take(pointer, 1)
            if i >= job.num_tokens:
                break
            row, position = rows[i], positions[i]
            is_turned = position >= job.num_sink_tokens + job.window_size
            half = job.half if is_turned else 0
            _merge_row(
                array(job.q + row * row_bytes, heads_shape, np.float32),
                job.kv_cache,
                block_bytes,
                pages_shape,
                dtype,
                array(
                    job.block_table + 4 * requests[i] * job.table_stride,
                    job.table_stride,
                    np.int32,
                ),
                min(job.num_sink_tokens, max(position - job.window_size + 1, 0)),
                np.float32(job.scale),
                np.float32(job.soft_cap),
                array(job.cos + 4 * row * half, half, np.float32),
                array(job.sin + 4 * row * half, half, np.float32),
                job.is_neox != 0,
                sink_logits,
                array(job.lse + 4 * row * job.num_heads, job.num_heads, np.float32),
                array(job.out + row * row_bytes, heads_shape, np.float32),
            )

    return merge


@numba.njit(inline="never", **OPTIONS)
def _merge_row(
    q,
    cache,
    block_bytes,
    pages_shape,
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
    """One query's heads: q and out [HQ, D], lse [HQ], cos and sin [half] or [0]."""
    num_heads, head_size = q.shape
    group = num_heads // pages_shape[0]
    block_size = pages_shape[1] // 2
    query = q * scale
    if cos.shape[0]:
        query = turned(query, cos, sin, is_neox)
    for head in range(num_heads):
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
            pages = array(cache + block * block_bytes, pages_shape, dtype)
            k = pages[head // group, offset]
            v = pages[head // group, block_size + offset]
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
