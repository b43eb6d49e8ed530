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
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.native import OPTIONS, array, take
from vllm_sink_kernels.cpu.rows import Slots

Job, _SIGNATURE = native.job_type(
    "WriteJob",
    "key key_stride value value_stride slots num_tokens caches head_kinds "
    "block_bytes num_kv_heads head_size block_size",
    "",
)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, caches: HeadCaches, slots: Slots
) -> None:
    """Store a step's keys and values in place, those of all heads in one call.

    Args:
        key, value: [T, HKV, D].
        caches: The layer's; a head's tokens go to its kind's slots.
        slots: The step's.
    """
    key, value = _storable(key, caches.dtype), _storable(value, caches.dtype)
    native.run(loop(caches.dtype), _job(key, value, caches, slots), 1)


def _job(key, value, caches, slots) -> Any:
    job: Any = Job()
    job.key, job.key_stride = key.data_ptr(), key.stride(0)
    job.value, job.value_stride = value.data_ptr(), value.stride(0)
    job.slots, job.num_tokens = slots.address, slots.num_tokens
    for name, number in caches.fields.items():
        setattr(job, name, number)
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
        caches = array(job.caches, job.num_kv_heads, np.int64)
        head_kinds = array(job.head_kinds, job.num_kv_heads, np.int64)
        shape = (job.num_kv_heads, job.head_size)
        page_shape = (2, job.block_size, job.head_size)
        while True:
            i = take(pointer, 1)
            if i >= job.num_tokens:
                break
            key = array(job.key + i * job.key_stride * size, shape, dtype)
            value = array(job.value + i * job.value_stride * size, shape, dtype)
            for head in range(job.num_kv_heads):
                place = job.slots + 8 * (head_kinds[head] * job.num_tokens + i)
                slot = array(place, 1, np.int64)[0]
                if slot < 0:
                    continue
                block, offset = slot // job.block_size, slot % job.block_size
                page = array(caches[head] + block * job.block_bytes, page_shape, dtype)
                for d in range(job.head_size):
                    page[0, offset, d] = key[head, d]
                    page[1, offset, d] = value[head, d]

    return write
