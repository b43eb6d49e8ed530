"""Writing this step's K and V into the paged cache, through any strides.

vLLM's ``reshape_and_cache_flash`` does the same for its own layouts; this one
takes every view that the attention kernels take, and runs where they run.
"""

import torch
import triton
import triton.language as tl

from vllm_sink_kernels.triton.checks import (
    DTYPES,
    FP8_DTYPES,
    check_cache,
    check_device,
    check_scale,
    pow2,
    require,
    require_contiguous_rows,
    require_dtype,
    require_shape,
)
from vllm_sink_kernels.triton.primitives import load_scale

MAX_TILE = 4096  # elements of K a program moves


@triton.jit
def quantize(b_x, scale, dtype: tl.constexpr, FP8_MAX: tl.constexpr):
    """``b_x / scale`` in the fp8 type, saturated at its largest value."""
    b_x = b_x.to(tl.float32) / scale
    return tl.minimum(tl.maximum(b_x, -FP8_MAX), FP8_MAX).to(dtype)


@triton.jit
def write_kv_cache_kernel(
    k_ptr,  # [T, HKV, D]
    v_ptr,
    k_cache_ptr,  # [B, N, HKV, D]
    v_cache_ptr,
    slots_ptr,  # int64 [T]
    k_scale,
    v_scale,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kcb,
    stride_kcn,
    stride_kch,
    stride_vcb,
    stride_vcn,
    stride_vch,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8_MAX: tl.constexpr,  # 0: the cache has the dtype of k
    K_SCALE_TENSOR: tl.constexpr,
    V_SCALE_TENSOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_slot = tl.load(slots_ptr + i_t)
    if i_slot < 0:
        return
    i_block = i_slot // BLOCK_SIZE
    i_n = i_slot % BLOCK_SIZE
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m = (o_h < NUM_KV_HEADS)[:, None] & (o_d < HEAD_SIZE)[None, :]
    o_h = o_h.to(tl.int64)[:, None]
    b_k = tl.load(k_ptr + i_t * stride_kt + o_h * stride_kh + o_d[None, :], mask=m)
    b_v = tl.load(v_ptr + i_t * stride_vt + o_h * stride_vh + o_d[None, :], mask=m)
    p_k = k_cache_ptr + i_block * stride_kcb + i_n * stride_kcn
    p_v = v_cache_ptr + i_block * stride_vcb + i_n * stride_vcn
    if FP8_MAX > 0:
        dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        b_k = quantize(b_k, load_scale(k_scale, K_SCALE_TENSOR), dtype, FP8_MAX)
        b_v = quantize(b_v, load_scale(v_scale, V_SCALE_TENSOR), dtype, FP8_MAX)
    tl.store(p_k + o_h * stride_kch + o_d[None, :], b_k, mask=m)
    tl.store(p_v + o_h * stride_vch + o_d[None, :], b_v, mask=m)


def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
) -> None:
    """Write K and V of T tokens to their slots of the cache, in place.

    Args:
        k, v: [T, HKV, D]; more rows than ``slot_mapping`` has are padding.
        k_cache, v_cache: [B, N, HKV, D] of the same dtype, or fp8 (e4m3): then
            ``x / scale`` is stored, saturated.
        slot_mapping: int64 [T], ``block * N + offset``; negative ones are skipped.
        k_scale, v_scale: 1 if missing; a tensor of one element is read on the
            device. Without fp8 they must be missing or are not applied.
    """
    require_shape("k", k, "[T, HKV, D]", None, None, None)
    require_dtype("k", k, *DTYPES)
    require_shape("v", v, "[T, HKV, D]", *k.shape)
    require_dtype("v", v, k.dtype)
    num_kv_heads, head_size = k.shape[1:]
    check_cache(k_cache, v_cache, head_size, k.dtype)
    require_shape(
        "k_cache", k_cache, "[B, N, HKV, D]", None, None, num_kv_heads, head_size
    )
    require_contiguous_rows("k", k)
    require_contiguous_rows("v", v)
    require_dtype("slot_mapping", slot_mapping, torch.int64)
    require(
        slot_mapping.dim() == 1
        and slot_mapping.is_contiguous()
        and len(slot_mapping) <= len(k),
        "slot_mapping",
        f"contiguous [T] with T <= {len(k)} tokens of k",
        f"{list(slot_mapping.shape)}, strides {list(slot_mapping.stride())}",
        "pass one slot a token",
    )
    check_scale("k_scale", k_scale)
    check_scale("v_scale", v_scale)
    check_device(k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    if len(slot_mapping) == 0:
        return
    block_d = pow2(head_size)
    block_h = min(int(triton.next_power_of_2(num_kv_heads)), MAX_TILE // block_d)
    fp8 = k_cache.dtype in FP8_DTYPES
    grid = (len(slot_mapping), triton.cdiv(num_kv_heads, block_h))
    write_kv_cache_kernel[grid](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        1.0 if k_scale is None else k_scale,
        1.0 if v_scale is None else v_scale,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=k_cache.shape[1],
        FP8_MAX=torch.finfo(k_cache.dtype).max if fp8 else 0.0,
        K_SCALE_TENSOR=isinstance(k_scale, torch.Tensor),
        V_SCALE_TENSOR=isinstance(v_scale, torch.Tensor),
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
