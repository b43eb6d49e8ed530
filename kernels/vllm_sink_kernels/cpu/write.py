"""A step's keys and values into the paged cache.

Shape letters: T tokens, HKV KV heads, D head size, N block size, B blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch

from vllm_sink_kernels.cpu import native
from vllm_sink_kernels.cpu.native import OPTIONS, array, take

Job, _SIGNATURE = native.job_type(
    "WriteJob",
    "key key_stride value value_stride kv_cache slots num_tokens num_kv_heads "
    "head_size block_size",
    "",
)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store a step's keys and values in place.

    Args:
        key, value: [T, HKV, D].
        kv_cache: [B, HKV, 2N, D] float32, bfloat16 or float16, contiguous.
        slots: [T] int64, block * N + offset; negative is padding.
    """
    key, value = _storable(key, kv_cache.dtype), _storable(value, kv_cache.dtype)
    job = _job(key, value, kv_cache, slots)
    native.run(loop(kv_cache.dtype), job, 1)


def _job(key, value, kv_cache, slots) -> Any:
    assert kv_cache.is_contiguous(), kv_cache.stride()
    job: Any = Job()
    job.key, job.key_stride = key.data_ptr(), key.stride(0)
    job.value, job.value_stride = value.data_ptr(), value.stride(0)
    job.kv_cache, job.slots = kv_cache.data_ptr(), slots.data_ptr()
    job.num_tokens = slots.shape[0]
    _, job.num_kv_heads, width, job.head_size = kv_cache.shape
    job.block_size = width // 2
    return job


def _storable(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in the dtype, a token's [HKV, D] consecutive."""
    x = x.to(dtype)
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@functools.cache
def loop(kv_cache_dtype: torch.dtype):
    """:data:`Job` -> tokens in the cache."""
    dtype = native.STORAGE[kv_cache_dtype]
    size = dtype.itemsize

    @numba.cfunc(_SIGNATURE, **OPTIONS)
    def write(pointer):
        job = numba.carray(pointer, 1)[0]
        slots = array(job.slots, job.num_tokens, np.int64)
        shape = (job.num_kv_heads, job.head_size)
        pages_shape = (job.num_kv_heads, 2, job.block_size, job.head_size)
        block_bytes = 2 * job.block_size * job.num_kv_heads * job.head_size * size
        while True:
            i = take(pointer, 1)
            if i >= job.num_tokens:
                break
            if slots[i] < 0:
                continue
            block, offset = slots[i] // job.block_size, slots[i] % job.block_size
            pages = array(job.kv_cache + block * block_bytes, pages_shape, dtype)
            key = array(job.key + i * job.key_stride * size, shape, dtype)
            value = array(job.value + i * job.value_stride * size, shape, dtype)
            for head in range(job.num_kv_heads):
                for d in range(job.head_size):
                    pages[head, 0, offset, d] = key[head, d]
                    pages[head, 1, offset, d] = value[head, d]

    return write
