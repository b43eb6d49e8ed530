"""What the launchers ask of their arguments; nothing here reads device memory."""

import torch
import triton

from vllm_sink_kernels.triton.launch_config import INTERPRETED

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# e4m3 as NVIDIA and gfx950 have it, and e4m3fnuz, which has no negative zero (gfx942).
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
MAX_HEAD_SIZE = 256


def require(ok: bool, name: str, constraint: str, got: object, remedy: str) -> None:
    """Raise ``<name> must be <constraint>, got <value>; <what to do>``."""
    if not ok:
        raise ValueError(f"{name} must be {constraint}, got {got}; {remedy}")


def require_shape(name: str, x: torch.Tensor, dims: str, *shape: int | None) -> None:
    """``x`` must have this shape, None matching any size."""
    ok = x.dim() == len(shape) and all(
        want is None or want == size for want, size in zip(shape, x.shape, strict=True)
    )
    want = "[" + ", ".join("*" if n is None else str(n) for n in shape) + "]"
    require(ok, name, f"{dims} = {want}", list(x.shape), "pass a view of that shape")


def require_dtype(name: str, x: torch.Tensor, *dtypes: torch.dtype) -> None:
    allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    require(x.dtype in dtypes, name, allowed, x.dtype, "convert it")


def require_contiguous_rows(name: str, x: torch.Tensor) -> None:
    require(
        x.stride(-1) == 1 or x.shape[-1] <= 1,
        name,
        "contiguous in its last dim (stride 1)",
        f"strides {list(x.stride())}",
        "permute the other dims only, or copy it",
    )


def check_device(q: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    require(
        INTERPRETED or q.device.type == "cuda",
        "q",
        "on a GPU",
        q.device,
        "move it there, or set TRITON_INTERPRET=1 before importing Triton",
    )
    for name, x in tensors.items():
        if x is not None:
            require(x.device == q.device, name, f"on {q.device}", x.device, "move it")


def check_scale(name: str, scale: float | torch.Tensor | None) -> None:
    if isinstance(scale, torch.Tensor):
        require(
            scale.numel() == 1 and scale.is_floating_point(),
            name,
            "a float or a floating-point tensor of one element",
            f"{scale.dtype} {list(scale.shape)}",
            "per-head scales are not supported",
        )
    elif scale is not None:
        require(scale > 0, name, "> 0", scale, "pass the cache's scale")


def check_cache(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    head_size: int,
    dtype: torch.dtype,
) -> None:
    """K and V caches [B, N, HKV, D] of ``dtype`` or fp8, strided as they like."""
    require_shape("k_cache", k_cache, "[B, N, HKV, D]", None, None, None, head_size)
    require_shape("v_cache", v_cache, "[B, N, HKV, D]", *k_cache.shape)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        require_dtype(name, x, dtype, *FP8_DTYPES)
        require_contiguous_rows(name, x)
    require_dtype("v_cache", v_cache, k_cache.dtype)
    if k_cache.dtype in FP8_DTYPES and not INTERPRETED and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(k_cache.device)
        require(
            capability >= (8, 9) and k_cache.dtype == torch.float8_e4m3fn,
            "k_cache",
            "float8_e4m3fn on a GPU of compute capability 8.9 or later",
            f"{k_cache.dtype} on {capability}",
            "use a cache in the model's dtype here",
        )


def check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    num_kv_heads: int,
    num_sink_tokens: int,
    window_size: int,
    cos_sin_cache: torch.Tensor | None,
    soft_cap: float,
    sink_logits: torch.Tensor | None,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
) -> None:
    """What decode and prefill ask alike; see ``reference.sink_attention``."""
    require_shape("q", q, "[T, HQ, D]", None, None, None)
    require_dtype("q", q, *DTYPES)
    require_contiguous_rows("q", q)
    num_heads, head_size = q.shape[1:]
    require(
        0 < head_size <= MAX_HEAD_SIZE and head_size % 8 == 0,
        "head size of q",
        f"a multiple of 8 up to {MAX_HEAD_SIZE}",
        head_size,
        "this model needs another backend",
    )
    check_cache(k_cache, v_cache, head_size, q.dtype)
    require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        "query heads of q",
        f"a multiple of the {num_kv_heads} KV heads",
        num_heads,
        "pass the heads of this rank only, for q and the caches alike",
    )
    require_shape("out", out, "[T, HQ, D]", *q.shape)
    require_dtype("out", out, q.dtype)
    require_contiguous_rows("out", out)
    require_shape("block_table", block_table, "[R, max_blocks]", None, None)
    require_dtype("block_table", block_table, torch.int32)
    require_contiguous_rows("block_table", block_table)
    require(
        num_sink_tokens >= 0, "num_sink_tokens", ">= 0", num_sink_tokens, "0 disables"
    )
    require(window_size >= 1, "window_size", ">= 1", window_size, "count the query")
    # Maxima are taken of scores before they are scaled.
    require(scale > 0, "scale", "> 0", scale, "pass 1 / sqrt(head size)")
    budget = num_sink_tokens + window_size
    require(
        budget < 1 << 31,
        "num_sink_tokens + window_size",
        "below 2^31",
        budget,
        "cap the window at the model length",
    )
    require(
        soft_cap >= 0, "soft_cap", ">= 0", soft_cap, "0 disables it, like None in vLLM"
    )
    if cos_sin_cache is not None:
        require_shape("cos_sin_cache", cos_sin_cache, "[P, rot_dim]", None, None)
        require_dtype("cos_sin_cache", cos_sin_cache, *DTYPES)
        require_contiguous_rows("cos_sin_cache", cos_sin_cache)
        rot_dim = cos_sin_cache.shape[1]
        require(
            0 < rot_dim <= head_size and rot_dim % 2 == 0,
            "rot_dim of cos_sin_cache",
            f"even and at most the head size {head_size}",
            rot_dim,
            "pass the table of this layer's rotary embedding",
        )
    if sink_logits is not None:
        require_shape("sink_logits", sink_logits, "[HQ]", num_heads)
        require_dtype("sink_logits", sink_logits, *DTYPES)
        require_contiguous_rows("sink_logits", sink_logits)
    check_scale("k_scale", k_scale)
    check_scale("v_scale", v_scale)
    check_device(
        q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        out=out,
        cos_sin_cache=cos_sin_cache,
        sink_logits=sink_logits,
        k_scale=k_scale if isinstance(k_scale, torch.Tensor) else None,
        v_scale=v_scale if isinstance(v_scale, torch.Tensor) else None,
    )


def pow2(n: int) -> int:
    """The power of two that a dim of ``n`` is padded to, 16 at least (matrix tiles)."""
    return max(16, int(triton.next_power_of_2(n)))
