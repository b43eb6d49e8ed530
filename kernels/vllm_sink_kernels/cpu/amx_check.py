"""Whether this machine multiplies in AMX's tiles, and whether it does so rightly.

The tiles are used where the CPU has them for bfloat16, the system gives the process
their memory, and a small step is answered in them as it is without.
"""

from __future__ import annotations

import ctypes
import functools
import os

import numpy as np
import torch

from vllm_sink_kernels.cpu import amx, flash
from vllm_sink_kernels.cpu.heads import HeadCaches
from vllm_sink_kernels.cpu.layouts import OWN, TILED, arrange
from vllm_sink_kernels.cpu.native import FEATURES, LANES
from vllm_sink_kernels.cpu.rows import Kind, Tiles

# For tests: "emulated" multiplies in tiles on any CPU with vectors of 16, in memory and
# slowly; "never" nowhere.
VARIABLE = "VLLM_SINK_CPU_TILES"
# Linux's arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def possible(
    cache_dtype: torch.dtype,
    q_dtype: torch.dtype,
    layout: int,
    block_size: int,
    head_size: int,
) -> int:
    """What can multiply such a layer's tiles, of :mod:`amx`; the rest as in caches."""
    if {cache_dtype, q_dtype} != {torch.bfloat16} or layout not in (OWN, TILED):
        return amx.NONE
    if block_size % amx.SIDE or head_size % amx.DEPTH or LANES != amx.SIDE:
        return amx.NONE
    wish = os.environ.get(VARIABLE, "")
    if wish == "emulated":
        return amx.EMULATED
    has_tiles = {"amx-tile", "amx-bf16"} <= FEATURES and wish != "never"
    return amx.AMX if has_tiles and is_granted() else amx.NONE


@functools.cache
def chosen(
    cache_dtype: torch.dtype,
    q_dtype: torch.dtype,
    layout: int,
    block_size: int,
    head_size: int,
) -> int:
    """What multiplies them: what can, unless it was tried and is wrong."""
    kind = possible(cache_dtype, q_dtype, layout, block_size, head_size)
    is_right = find_fault(kind, layout, block_size, head_size) is None
    return kind if is_right else amx.NONE


@functools.cache
def is_granted() -> bool:
    """Ask Linux for the tiles' memory: for the process, all its threads included."""
    try:
        syscall = ctypes.CDLL(None).syscall
    except (AttributeError, OSError):  # another system
        return False
    syscall.restype = ctypes.c_long
    request = [ctypes.c_long(x) for x in (_ARCH_PRCTL, _REQUEST, _TILE_DATA)]
    return syscall(*request) == 0


@functools.cache
def find_fault(kind: int, layout: int, block_size: int, head_size: int) -> str | None:
    """What is wrong with products in tiles on this machine, or None.

    Queries whose keys begin and end within blocks and tiles, three heads to a KV head,
    see sinks and a window; what lies beside is NaN.
    """
    if kind == amx.NONE:
        return None
    got, want = (
        _attend(kind, in_tiles, layout, block_size, head_size)
        for in_tiles in (True, False)
    )
    limit = 4 * torch.finfo(want.dtype).eps * max(1.0, want.abs().max().item())
    error = (got.float() - want.float()).abs().nan_to_num(torch.inf).max().item()
    return None if error <= limit else f"they differ by {error:.1e}, above {limit:.1e}"


def _attend(
    kind: int, in_tiles: bool, layout: int, block_size: int, head_size: int
) -> torch.Tensor:
    """Attention of a tile of random queries [T, 3, D]."""
    num_sinks, window_size, count = 3, 2 * block_size + 5, 29
    first = window_size + block_size + 7
    generator = torch.Generator().manual_seed(0)
    last = -(-(first + count) // block_size)
    key, value = torch.randn(
        2, last * block_size, head_size, generator=generator
    ).bfloat16()
    position = torch.arange(last * block_size)
    seen = (position > first - window_size) & (position < first + count)
    for x in (key, value):
        x[~(seen | (position < num_sinks))] = torch.nan
    pages = [
        arrange(k, v, layout)
        for k, v in zip(key.split(block_size), value.split(block_size), strict=True)
    ]
    caches = HeadCaches((torch.stack(pages),), (0,), layout)
    table = torch.arange(last, dtype=torch.int32)[None]
    tiles = Tiles(
        np.array([[0, count, 0, first]], np.int64),
        (Kind(table, num_sinks, window_size),),
        block_size,
        1 << 40,
    )
    q = torch.randn(count, 3, head_size, generator=generator).bfloat16()
    out = torch.full_like(q, torch.nan)
    scale = head_size**-0.5
    flash.attend_tiles(q, caches, tiles, out, scale=scale, kind=kind, in_tiles=in_tiles)
    return out
