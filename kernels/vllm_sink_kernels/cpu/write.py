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
from vllm_sink_kernels.cpu.layouts import OWN
from vllm_sink_kernels.cpu.native import array, take
from vllm_sink_kernels.cpu.rows import Slots

# Tokens of an item of work.
TOKENS = 64

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
        caches: The layer's, in our own layout; a head's tokens go to its kind's slots.
        slots: The step's.
    """
    assert caches.layout == OWN, caches.layout
    key, value = _storable(key, caches.dtype), _storable(value, caches.dtype)
    is_long = slots.num_tokens > TOKENS
    num_threads = torch.get_num_threads() if is_long else 1
    native.run(loop(caches.dtype), _job(key, value, caches, slots), num_threads)


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
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@functools.cache
def loop(kv_cache_dtype: torch.dtype):
    """:data:`Job` -> tokens in the cache, an item a KV head of some tokens."""
    dtype = native.STORAGE[kv_cache_dtype]
    size = dtype.itemsize
    pack = 2 if kv_cache_dtype == torch.bfloat16 else 1
    version = native.VERSION

    @native.compiled(_SIGNATURE, "write", kv_cache_dtype)
    def write(pointer):
        job = numba.carray(pointer, 1)[0]
        if version == 0:
            return
        caches = array(job.caches, job.num_kv_heads, np.int64)
        head_kinds = array(job.head_kinds, job.num_kv_heads, np.int64)
        head_size, block_size = job.head_size, job.block_size
        keys_shape = (head_size // pack, block_size, pack)
        values_shape = (block_size, head_size)
        num_pieces = (job.num_tokens + TOKENS - 1) // TOKENS
        while True:
            item = take(pointer, 1)
            if item >= num_pieces * job.num_kv_heads:
                break
            head, start = item % job.num_kv_heads, item // job.num_kv_heads * TOKENS
            slots = array(
                job.slots + 8 * head_kinds[head] * job.num_tokens,
                job.num_tokens,
                np.int64,
            )
            for i in range(start, min(start + TOKENS, job.num_tokens)):
                slot = slots[i]
                if slot < 0:
                    continue
                page = caches[head] + slot // block_size * job.block_bytes
                offset = slot % block_size
                keys = array(page, keys_shape, dtype)
                values = array(
                    page + block_size * head_size * size, values_shape, dtype
                )
                at_head = head * head_size
                key = array(
                    job.key + size * (i * job.key_stride + at_head), head_size, dtype
                )
                value = array(
                    job.value + size * (i * job.value_stride + at_head),
                    head_size,
                    dtype,
                )
                for d in range(0, head_size, pack):
                    for j in range(pack):
                        keys[d // pack, offset, j] = key[d + j]
                for d in range(head_size):
                    values[offset, d] = value[d]

    return write
