"""Decode of heads of two kinds: orders and tiles, against the straight line.

``scripts/gpu_check.py --part mixes`` runs it: right first, then times by how many of
the KV heads keep everything. The straight line lies between none and all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm_sink_kernels.triton import launch_config
from vllm_sink_kernels.triton.decode import DecodeLauncher, workspace_shape
from vllm_sink_kernels.triton.launch_config import LaunchConfig

from benchmarks import gpu_kernels
from benchmarks.gpu_batches import DEVICE, Paged, paged_heads
from benchmarks.gpu_kernels import Table, retrieval_policies
from benchmarks.gpu_prefill import error_of

TILES = {
    "16 keys, 2 warps": LaunchConfig(16, 16, 2, 3),
    "32 keys, 4 warps": LaunchConfig(16, 32, 4, 3),
}
ORDERS = {"long first": True, "head by head": False}
COUNTS = (0, 2, 4, 8)  # of 8 KV heads keep everything
BATCHES = (1, 16, 64)
NUM_TOKENS = 32768
CHECKED = ([700, 90, 1], [(0, 4096), (4, 60), (4, 60), (0, 4096)])
TARGET = 1.05  # of the straight line


def decode_call(
    x: Paged, out: torch.Tensor, tile: LaunchConfig, heads_slowest: bool, **kw: Any
) -> Callable[[], object]:
    step = x.layer_args(out, **kw)
    launch = DecodeLauncher(step, tile, heads_slowest)
    cores = launch_config.num_cores(x.q.device)
    shape = workspace_shape(x.q.shape[1], x.q.shape[2], 1, cores)
    space = torch.empty(shape, device=DEVICE)
    return lambda: launch(step.pointers(), x.positions, x.requests, space)


def variants() -> list[tuple[str, LaunchConfig, bool]]:
    return [
        (f"{tile}, {order}", TILES[tile], ORDERS[order])
        for tile in TILES
        for order in ORDERS
    ]


def check_variants() -> int:
    """How many variants are wrong: of each head, against its own batch."""
    lens, policies = CHECKED
    layout = gpu_kernels.LAYOUT
    group = gpu_kernels.HEADS[0] // gpu_kernels.HEADS[1]
    x, parts = paged_heads(lens, [1] * len(lens), policies, group=group, **layout)
    kw = gpu_kernels.settings(max(lens))
    failed = 0
    for name, tile, slowest in variants():
        out = torch.full_like(x.q, torch.nan)
        decode_call(x, out, tile, slowest, **kw)()
        shares = [
            error_of(lambda to, own=own: to.copy_(own), part, **kw)
            for part, own in zip(parts, out.split(group, dim=1), strict=True)
        ]
        print(f"{name}: error {max(shares):.2f} of the limit", flush=True)
        failed += max(shares) > 1
    print(f"mixes: {len(variants())} variants, {failed} failed")
    return failed


def time_mixes(table: Table) -> None:
    group = gpu_kernels.HEADS[0] // gpu_kernels.HEADS[1]
    n = NUM_TOKENS
    for batch in BATCHES:
        times: dict[str, dict[int, float]] = {name: {} for name, *_ in variants()}
        for count in COUNTS:
            policies = retrieval_policies(count, n)
            kept = sum(min(n, s + w) for s, w in policies)
            x, _ = paged_heads(
                [n] * batch, [1] * batch, policies, group=group, **gpu_kernels.LAYOUT
            )
            kw, out = gpu_kernels.settings(n), torch.empty_like(x.q)
            for name, tile, slowest in variants():
                table.add(
                    f"sink_decode, {name}",
                    f"decode, batch {batch}, {n} tokens, {count} of "
                    f"{len(policies)} heads keep everything, {gpu_kernels.MODEL}",
                    lambda x=x, out=out, tile=tile, slowest=slowest, kw=kw: (
                        gpu_kernels.graphed(decode_call(x, out, tile, slowest, **kw))
                    ),
                    num_bytes=2 * batch * kept * gpu_kernels.HEAD_SIZE * 2,
                )
                times[name][count] = table.rows[-1]["median_ms"]
            del x, out
        for name, by_count in times.items():
            none, every = by_count[COUNTS[0]], by_count[COUNTS[-1]]
            for count in COUNTS[1:-1]:
                line = none + (every - none) * count / COUNTS[-1]
                print(
                    f"batch {batch}, {count} heads, {name}: "
                    f"{by_count[count] / line:.2f} of the straight line"
                )


def run(write: Callable[[dict[str, Any]], None] | None, repeats: int) -> int:
    """Failed variants; times follow if there is somewhere to write them."""
    failed = check_variants()
    if write is not None and not failed:
        time_mixes(Table(repeats, write))
    return failed
