"""GPUs, head sizes and dtypes that the GPU path supports; needs no Triton.

The kernels are compiled ahead of time for sm_80, sm_90, sm_100, sm_120, gfx942
and gfx950 (tests/kernels_aot). CUDA devices in between (8.6, 8.9) get the tiles
that fit the smallest shared memory of the family.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

MIN_CUDA = (8, 0)
MIN_CUDA_FP8 = (8, 9)
ROCM = ((9, 4), (9, 5))  # gfx942, gfx950
MAX_HEAD_SIZE = 256
FP8_KV_CACHE_DTYPES = ("fp8", "fp8_e4m3")
_DTYPE_NAMES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def supports_head_size(head_size: int) -> bool:
    return 0 < head_size <= MAX_HEAD_SIZE and head_size % 8 == 0


def supports_capability(capability: Any) -> bool:
    """Whether a GPU is supported; ``capability`` is vLLM's (major, minor), ROCm too."""
    if current_platform.is_rocm():
        return tuple(capability) in ROCM
    return current_platform.is_cuda() and tuple(capability) >= MIN_CUDA


def refusal(
    head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, capability: Any
) -> str | None:
    """Reason this combination is unsupported, or None; vLLM adds its own."""
    if not supports_capability(capability):
        return (
            "--attention-backend sink needs CUDA of compute capability 8.0 or later, "
            f"gfx942 or gfx950, got {current_platform.device_name} "
            f"{tuple(capability)}; use another backend"
        )
    if not supports_head_size(head_size):
        return (
            f"head size must be a multiple of 8 up to {MAX_HEAD_SIZE}, got "
            f"{head_size}; use another backend"
        )
    if kv_cache_dtype in FP8_KV_CACHE_DTYPES:
        if current_platform.is_cuda() and tuple(capability) < MIN_CUDA_FP8:
            return (
                f"kv_cache_dtype must be auto on compute capability "
                f"{tuple(capability)}, got {kv_cache_dtype}; an fp8 cache needs 8.9"
            )
    elif kv_cache_dtype and _DTYPE_NAMES.get(kv_cache_dtype, dtype) != dtype:
        return (
            f"kv_cache_dtype must be auto, fp8 or the model's dtype {dtype}, got "
            f"{kv_cache_dtype}; leave the flag out"
        )
    return None
