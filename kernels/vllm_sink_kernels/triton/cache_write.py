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
from vllm_sink_kernels.triton.head_table import HeadTable
from vllm_sink_kernels.triton.primitives import (
    HEAD_COLUMN,
    HEAD_COLUMNS,
    K_COLUMN,
    SLOTS_COLUMN,
    V_COLUMN,
    load_scale,
)

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
    k_cache_ptr,  # [B, N, HKV, D]; with heads, any head's: its dtype counts
    v_cache_ptr,
    slots_ptr,  # int64 [T]
    heads_ptr,  # int64 [HKV, HEAD_COLUMNS], or None: heads share the cache
    k_scale,
    v_scale,
    k_strides,  # token, head
    v_strides,
    k_cache_strides,  # block, slot, head
    v_cache_strides,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8_MAX: tl.constexpr,  # 0: the cache has the dtype of k
    K_SCALE_TENSOR: tl.constexpr,
    V_SCALE_TENSOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < NUM_KV_HEADS
    if heads_ptr is not None:
        p_row = heads_ptr + o_h * HEAD_COLUMNS
        o_h = tl.load(p_row + HEAD_COLUMN, mask=m_h, other=0).to(tl.int32)
        p_slots = tl.load(p_row + SLOTS_COLUMN, mask=m_h, other=0).to(slots_ptr.dtype)
        b_slot = tl.load(p_slots + i_t, mask=m_h, other=-1)
        m_h = m_h & (b_slot >= 0)
        p_k = tl.load(p_row + K_COLUMN, mask=m_h, other=0).to(k_cache_ptr.dtype)
        p_v = tl.load(p_row + V_COLUMN, mask=m_h, other=0).to(v_cache_ptr.dtype)
        p_k = tl.multiple_of(p_k, ALIGNMENT)
        p_v = tl.multiple_of(p_v, ALIGNMENT)
    else:
        i_slot = tl.load(slots_ptr + i_t)
        if i_slot < 0:
            return
        b_slot = tl.zeros([BLOCK_H], dtype=tl.int64) + i_slot
        p_k = k_cache_ptr + o_h.to(tl.int64) * k_cache_strides[2]
        p_v = v_cache_ptr + o_h.to(tl.int64) * v_cache_strides[2]
    b_block = b_slot // BLOCK_SIZE
    b_n = b_slot % BLOCK_SIZE
    p_k = p_k + b_block * k_cache_strides[0] + b_n * k_cache_strides[1]
    p_v = p_v + b_block * v_cache_strides[0] + b_n * v_cache_strides[1]
    o_d = tl.arange(0, BLOCK_D)
    m = m_h[:, None] & (o_d < HEAD_SIZE)[None, :]
    o_h = o_h.to(tl.int64)[:, None]
    p_bk = k_ptr + i_t * k_strides[0] + o_h * k_strides[1]
    p_bv = v_ptr + i_t * v_strides[0] + o_h * v_strides[1]
    b_k = tl.load(p_bk + o_d[None, :], mask=m)
    b_v = tl.load(p_bv + o_d[None, :], mask=m)
    if FP8_MAX > 0:
        dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        b_k = quantize(b_k, load_scale(k_scale, K_SCALE_TENSOR), dtype, FP8_MAX)
        b_v = quantize(b_v, load_scale(v_scale, V_SCALE_TENSOR), dtype, FP8_MAX)
    tl.store(p_k[:, None] + o_d[None, :], b_k, mask=m)
    tl.store(p_v[:, None] + o_d[None, :], b_v, mask=m)


class WriteLauncher:
    """A layer's cache write with its arguments checked: what is left is the launch."""

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        heads: HeadTable | None = None,
    ) -> None:
        require_shape("k", k, "[T, HKV, D]", None, None, None)
        require_dtype("k", k, *DTYPES)
        require_shape("v", v, "[T, HKV, D]", *k.shape)
        require_dtype("v", v, k.dtype)
        num_kv_heads, head_size = k.shape[1:]
        check_cache(k_cache, v_cache, head_size, k.dtype)
        heads_of_cache = num_kv_heads
        if heads is not None:
            heads_of_cache = 1
            require(
                heads.num_kv_heads == num_kv_heads,
                "heads",
                f"a table of the {num_kv_heads} KV heads of k",
                heads.num_kv_heads,
                "pass the heads of this rank only",
            )
        require_shape(
            "k_cache", k_cache, "[B, N, HKV, D]", None, None, heads_of_cache, head_size
        )
        require_contiguous_rows("k", k)
        require_contiguous_rows("v", v)
        check_scale("k_scale", k_scale)
        check_scale("v_scale", v_scale)
        check_device(k, v=v, k_cache=k_cache, v_cache=v_cache)
        block_d = pow2(head_size)
        block_h = min(int(triton.next_power_of_2(num_kv_heads)), MAX_TILE // block_d)
        fp8 = k_cache.dtype in FP8_DTYPES
        self.blocks_of_heads = triton.cdiv(num_kv_heads, block_h)
        self.fixed = {
            "k_strides": k.stride()[:2],
            "v_strides": v.stride()[:2],
            "k_cache_strides": k_cache.stride()[:3],
            "v_cache_strides": v_cache.stride()[:3],
            "k_scale": 1.0 if k_scale is None else k_scale,
            "v_scale": 1.0 if v_scale is None else v_scale,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": k_cache.shape[1],
            "FP8_MAX": torch.finfo(k_cache.dtype).max if fp8 else 0.0,
            "K_SCALE_TENSOR": isinstance(k_scale, torch.Tensor),
            "V_SCALE_TENSOR": isinstance(v_scale, torch.Tensor),
            "ALIGNMENT": 0 if heads is None else heads.alignment,
            "BLOCK_H": block_h,
            "BLOCK_D": block_d,
            "num_warps": 4,
        }

    def __call__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        heads_rows: torch.Tensor | None = None,
    ) -> None:
        """Launch; ``heads_rows`` are those of a table of heads."""
        write_kv_cache_kernel[(slot_mapping.shape[0], self.blocks_of_heads)](
            k_ptr=k,
            v_ptr=v,
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            slots_ptr=slot_mapping,
            heads_ptr=heads_rows,
            **self.fixed,
        )


def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    heads: HeadTable | None = None,
) -> None:
    """Write K and V of T tokens to their slots of the cache, in place.

    Args:
        k, v: [T, HKV, D]; more rows than ``slot_mapping`` has are padding.
        k_cache, v_cache: [B, N, HKV, D] of the same dtype, or fp8 (e4m3): then
            ``x / scale`` is stored, saturated.
        slot_mapping: int64 [T], ``block * N + offset``; negative ones are skipped.
        k_scale, v_scale: 1 if missing; a tensor of one element is read on the
            device. Without fp8 they must be missing or are not applied.
        heads: cache and slot mapping of each KV head; of ``slot_mapping``, as of
            any one head, only the length counts then.
    """
    launch = WriteLauncher(k, v, k_cache, v_cache, k_scale, v_scale, heads)
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
    check_device(k, slot_mapping=slot_mapping)
    if len(slot_mapping) > 0:
        rows = None if heads is None else heads.rows
        launch(k, v, k_cache, v_cache, slot_mapping, rows)
