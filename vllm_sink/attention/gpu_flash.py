"""Prompts on Hopper: FlashAttention 3 for the window, Triton for the sinks.

vLLM ships FlashAttention 3, whose products run at a rate that Triton has no hand for.
It serves the window of layers whose heads share one policy and a 16-bit cache, a Triton
kernel adds the sinks (:mod:`vllm_sink_kernels.triton.window`). Platform and case alone
choose it. Before a process uses it, a small step on the device must agree with this
project's own kernel. Whatever else happens, that kernel serves the prompt and the log
says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm_sink_kernels.triton.arguments import AttentionArgs, Pointers
from vllm_sink_kernels.triton.prefill import sink_prefill
from vllm_sink_kernels.triton.window import WindowPrefill

from vllm_sink.attention.gpu_plan import SinkGpuMetadata

logger = init_logger("vllm.plugins.sink")

HOPPER = (9, 0)
# Where FlashAttention's window alone was timed against the kernel that it replaces.
HEAD_SIZES = (128,)
DTYPES = (torch.bfloat16, torch.float16)


def is_hopper() -> bool:
    return (
        current_platform.is_cuda()
        and current_platform.get_device_capability() == HOPPER
    )


def find_attention() -> Callable[..., Any]:
    """vLLM's FlashAttention 3; an ImportError says why there is none."""
    from vllm.vllm_flash_attn.flash_attn_interface import (
        fa_version_unsupported_reason,
        flash_attn_varlen_func,
        is_fa_version_supported,
    )

    if not is_fa_version_supported(3):
        raise ImportError(str(fa_version_unsupported_reason(3)))
    return flash_attn_varlen_func


def why_not(args: AttentionArgs) -> str | None:
    """What of a layer FlashAttention 3 does not serve, or None."""
    head_size, dtype = args.q.shape[2], args.k_cache.dtype
    if args.heads is not None:
        return "heads of two kinds have a cache each"
    if head_size not in HEAD_SIZES:
        return f"head size {head_size} is not one of {HEAD_SIZES}"
    if dtype not in DTYPES or dtype != args.q.dtype:
        return f"the cache is in {dtype}, not in 16 bits"
    if args.soft_cap or args.sink_logits is not None:
        return "scores are capped, or have sink logits"
    return None


class FlashPrefill:
    """A layer's prompts in FlashAttention 3, if that can serve them here.

    Attributes:
        verdicts: What the check of a shape on the device said, once a process: of the
            device, not of an engine. None is agreement.
    """

    verdicts: ClassVar[dict[Any, str | None]] = {}

    def __init__(self, args: AttentionArgs) -> None:
        self._args: AttentionArgs | None = args if is_hopper() else None
        self._launch: WindowPrefill | None = None

    def run(self, pointers: Pointers, plan: SinkGpuMetadata) -> bool:
        """Serve the prefill part of a step, or leave it alone and say so.

        A CUDA graph keeps the grid that it was captured with, so that FlashAttention's,
        which follows the batch, is not for it. The first call waits for the device.
        """
        if plan.is_captured:
            return False
        if self._args is not None:
            self._launch, self._args = choose(self._args), None
        launch = self._launch
        if launch is None:
            return False
        first = plan.num_decodes, plan.num_decode_tokens
        if plan.window_view is None:  # the first layer's serves them all
            plan.window_view = launch.view(
                plan.block_table,
                plan.query_start_loc,
                plan.seq_lens,
                plan.max_query_len,
                plan.max_seq_len,
                *first,
            )
        launch(
            pointers,
            plan.window_view,
            plan.query_start_loc,
            plan.seq_lens,
            plan.num_tokens,
            *first,
        )
        return True


def choose(args: AttentionArgs) -> WindowPrefill | None:
    """The layer's launch, or None; the log has the reason once."""
    reason = why_not(args)
    if reason is None:
        key = (args.variant(), args.q.dtype, args.q.device)
        if key not in FlashPrefill.verdicts:
            FlashPrefill.verdicts[key] = find_fault(args)
        reason = FlashPrefill.verdicts[key]
    if reason is not None:
        logger.info_once("Prompts are served by Triton: %s", reason)
        return None
    logger.info_once("Prompts are served by FlashAttention 3, sinks added by Triton")
    return WindowPrefill(args, find_attention())


def find_fault(args: AttentionArgs) -> str | None:
    """What is wrong with FlashAttention 3 on this device, or None.

    It serves a small step of the layer's shape, as this project's own kernel does: a
    prompt, a chunk far past the window whose gap is poisoned, and a short one.
    """
    try:
        attend = find_attention()
        for query_lens, seq_lens in (([70, 40], [70, 600]), ([20], [20])):
            got, want = compare(args, attend, query_lens, seq_lens)
            limit = 4 * torch.finfo(want.dtype).eps * max(1.0, want.abs().max().item())
            error = (
                (got.float() - want.float()).abs().nan_to_num(torch.inf).max().item()
            )
            if error > limit:
                return f"FlashAttention 3 differs by {error:.1e}, above {limit:.1e}"
    except Exception as error:
        return f"FlashAttention 3 failed, {type(error).__name__}: {error}"
    return None


def compare(
    args: AttentionArgs,
    attend: Callable[..., Any],
    query_lens: list[int],
    seq_lens: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, HQ, D] of a step of random numbers: in question, and trusted."""
    num_heads, head_size = args.q.shape[1:]
    block_size, num_kv_heads = args.k_cache.shape[1:3]
    window_size, num_sink_tokens = 20, min(args.num_sink_tokens, 20)
    new: dict[str, Any] = {"device": args.q.device, "dtype": args.q.dtype}
    generator = torch.Generator(args.q.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, **new)

    width = -(-max(seq_lens) // block_size)
    shape = len(seq_lens) * width + 1, num_kv_heads, block_size, 2 * head_size
    cache = random(*shape)
    cache[0] = torch.nan
    table = torch.zeros(len(seq_lens), width, dtype=torch.int32)
    for r, (m, n) in enumerate(zip(query_lens, seq_lens, strict=True)):
        keys = torch.arange(n)
        held = keys[(keys < num_sink_tokens) | (keys > n - m - window_size)]
        blocks = (held // block_size).unique()
        table[r, blocks] = 1 + r * width + blocks.int()
    k_cache, v_cache = cache.transpose(1, 2).split(head_size, dim=-1)
    q = random(sum(query_lens), num_heads, head_size)
    cos_sin_cache = args.cos_sin_cache
    if cos_sin_cache is not None:
        table_dtype = cos_sin_cache.dtype
        angles = torch.rand(
            (max(seq_lens), cos_sin_cache.shape[1] // 2),
            generator=generator,
            device=args.q.device,
        )
        cos_sin_cache = torch.cat([angles.cos(), angles.sin()], 1)
        cos_sin_cache = cos_sin_cache.to(table_dtype)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": args.q.device}
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(**ints)
    lens = torch.tensor(seq_lens).to(**ints)
    table = table.to(args.q.device)
    layer: dict[str, Any] = {
        "scale": args.scale,
        "num_sink_tokens": num_sink_tokens,
        "window_size": window_size,
        "cos_sin_cache": cos_sin_cache,
        "is_neox": args.is_neox,
    }
    longest = max(query_lens)
    got = torch.empty_like(q)
    step = AttentionArgs(q, k_cache, v_cache, table, got, **layer)
    launch = WindowPrefill(step, attend)
    view = launch.view(table, starts, lens, longest, max(seq_lens), 0, 0)
    launch(step.pointers(), view, starts, lens, len(q))
    want = sink_prefill(replace(step, out=torch.empty_like(q)), starts, lens)
    return got, want
