"""Every way to serve a prompt on Hopper: each right first, then each timed.

``scripts/gpu_check.py --part prefill`` runs it. The variants are this project's kernel
with tiles of several sizes and FlashAttention 3 with the sinks added; beside them
FlashAttention 3 with the window alone, which is what they are measured against, and
over all keys.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm_sink_kernels import reference
from vllm_sink_kernels.triton.launch_config import LaunchConfig
from vllm_sink_kernels.triton.window import WindowPrefill

from benchmarks import gpu_kernels
from benchmarks.gpu_batches import INTERPRET, Paged, paged, rope_table
from benchmarks.gpu_kernels import Table, run_prefill

SHIPPED = LaunchConfig(128, 128, 8, 3, edge_n=32)
TILES = {
    "shipped": SHIPPED,
    "edges of 16": replace(SHIPPED, edge_n=16),
    "edges of 64": replace(SHIPPED, edge_n=64),
    "64 keys": LaunchConfig(128, 64, 8, 3),
}
# S, W, tokens so far and of the step: prompts, chunks past the window, ragged ends.
LENGTHS = ([1000, 4500, 7, 333], [1000, 300, 7, 1])
POLICIES = ((0, 600), (4, 252), (20, 700))
BLOCK_SIZES = (16, 128)
if INTERPRET:
    LENGTHS = ([190, 300, 7, 33], [9, 5, 7, 1])
    POLICIES = ((0, 60), (20, 150))
PROMPTS = [(8192, 4, 2044), (32768, 4, 4092), (4096, 4, 4092)]
TARGET = 0.85  # of FlashAttention 3's rate with the window alone


def find_attention() -> Callable[..., Any]:
    """FlashAttention 3, or in the interpreter its stand-in."""
    if INTERPRET:
        from tests.kernels.flash_stand_in import flash_attn_varlen_func
    else:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func
    return flash_attn_varlen_func


def flash_call(x: Paged, out: torch.Tensor, **kw: Any) -> Callable[[], object]:
    """The step as ``WindowPrefill`` serves it in a layer; its view is made once."""
    step = x.layer_args(out, **kw)
    launch = WindowPrefill(step, find_attention())
    longest = int(x.lens.max())
    view = launch.view(x.block_table, x.starts, x.lens, x.max_query_len, longest, 0, 0)
    return lambda: launch(step.pointers(), view, x.starts, x.lens, len(x.q))


def error_of(call: Callable[[torch.Tensor], object], x: Paged, **kw: Any) -> float:
    """The largest error as a share of what the reference in 16 bits allows."""
    out = torch.full_like(x.q, torch.nan)
    call(out)
    args = (*x.args, x.starts, x.lens)
    want, low = (
        reference.sink_attention(*args, compute_dtype=dtype, **(x.kw | kw)).double()
        for dtype in (torch.float64, x.q.dtype)
    )
    floor = 8 * torch.finfo(x.q.dtype).eps * max(1.0, want.abs().max().item())
    limit = 2 * (low - want).abs().max().item() + floor
    error = (out.double() - want).abs().nan_to_num(torch.inf).max().item()
    return error / limit


def check_variants() -> int:
    """How many variants are wrong somewhere."""
    failed = set()
    head_size = gpu_kernels.HEAD_SIZE
    for sinks, window in POLICIES:
        for block_size in BLOCK_SIZES:
            x = paged(
                *LENGTHS,
                heads=(8, 2),
                head_size=head_size,
                block_size=block_size,
                sinks=sinks,
                window=window,
                dtype=gpu_kernels.DTYPE,
            )
            kw = {"scale": head_size**-0.5}
            kw["cos_sin_cache"] = rope_table(max(LENGTHS[0]), head_size, x.q.dtype)
            calls: dict[str, Callable[[torch.Tensor], object]] = {
                name: lambda out, x=x, kw=kw, tile=tile: run_prefill(
                    x, out, config=tile, **kw
                )
                for name, tile in TILES.items()
            }
            calls["FA3 and sinks"] = lambda out, x=x, kw=kw: flash_call(x, out, **kw)()
            for name, call in calls.items():
                case = f"{name}, {sinks}+{window}, blocks of {block_size}"
                try:
                    share = error_of(call, x, **kw)
                except Exception as error:
                    print(f"FAILED, {case}: {type(error).__name__}: {error}")
                    failed.add(name)
                    continue
                print(f"{case}: error {share:.2f} of the limit", flush=True)
                if share > 1:
                    failed.add(name)
    print(f"prefill: {len(TILES) + 1} variants, {len(failed)} failed {sorted(failed)}")
    return len(failed)


def time_prompts(table: Table) -> None:
    """Rows of each variant, and what share of FlashAttention's rate each has."""
    heads, head_size = gpu_kernels.HEADS, gpu_kernels.HEAD_SIZE
    for n, sinks, window in PROMPTS:
        policy = {"sinks": sinks, "window": window}
        x = paged([n], [n], heads=heads, **policy, **gpu_kernels.LAYOUT)
        kw = gpu_kernels.settings(n)
        out = torch.empty_like(x.q)
        shape = f"prompt {n}, {sinks}+{window}, {gpu_kernels.MODEL}"
        work = 4 * heads[0] * head_size
        bounded = {"flops": gpu_kernels.attended(n, sinks + window) * work}
        start = len(table.rows)
        for name, width in (("window", window), ("all keys", 0)):
            keys = gpu_kernels.attended(n, sinks + window if width else n)
            table.add(
                f"FA3, {name}",
                shape,
                lambda width=width, x=x: gpu_kernels.graphed(
                    gpu_kernels.flash(x, width)
                ),
                flops=keys * work,
            )
        for name, tile in TILES.items():
            table.add(
                f"ours, {name}",
                shape,
                lambda x=x, out=out, tile=tile, kw=kw: gpu_kernels.graphed(
                    lambda: run_prefill(x, out, config=tile, **kw)
                ),
                **bounded,
            )
        table.add(
            "FA3 and sinks",
            shape,
            lambda x=x, out=out, kw=kw: gpu_kernels.graphed(flash_call(x, out, **kw)),
            **bounded,
        )
        rows = {row["what"]: row["tflops"] for row in table.rows[start:]}
        peer = rows.pop("FA3, window", 0)
        for what, rate in rows.items():
            if peer:
                print(f"{shape}: {what}: {rate / peer:.2f} of FA3's rate with a window")


def run(write: Callable[[dict[str, Any]], None] | None, repeats: int) -> int:
    """Failed variants; times follow if there is somewhere to write them."""
    failed = check_variants()
    if write is not None:
        time_prompts(Table(repeats, write))
    return failed
