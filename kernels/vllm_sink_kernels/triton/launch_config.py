"""Launch configurations: one small table per target, looked up, never tuned.

A row answers "up to this head size, this GQA group and this budget (S + W), use
these tiles". Rows are tried in order and the first that fits wins, so each table
ends with a row that fits everything. Targets without a table of their own use
the one of their family, whose tiles fit the smallest shared memory of it
(99 KiB on ``cuda``, 64 KiB on ``hip``).

To extend it: time the candidates with ``scripts/gpu_check.py``, put a row for
the target in ``DECODE`` or ``PREFILL`` (a new key such as ``"sm_103"`` makes a
table), and run ``python -m pytest tests/kernels_aot``, which compiles every row
ahead of time and fails on a spill, a stack frame or too much shared memory.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton

ANY = 1 << 31
MAX_SPLITS = 64
KEYS_PER_SPLIT = 128
PROGRAMS_PER_CORE = 2  # of decode; within 11% of the best on an H100
INTERPRETER_CORES = 8  # a small machine, so that tests see several splits

# Triton decides at import, when it decorates a kernel, whether to interpret it.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles and pipeline of one launch.

    ``block_m`` counts rows of queries (tokens x heads of a group); decode pads
    its group to at least 16 and ignores it. ``block_n`` counts keys; ``edge_n`` those
    of prefill's tiles that hide some (sinks, the ends of the window), if it is fewer.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_n: int = 0  # 0: block_n


@dataclass(frozen=True)
class Row:
    """``config`` for head sizes, groups and budgets up to these limits."""

    head_size: int
    group: int
    budget: int
    config: LaunchConfig


# Three stages load K and V two tiles ahead; fewer would wait for memory tile by tile.
DECODE: dict[str, list[Row]] = {
    "cuda": [
        Row(64, 16, 1024, LaunchConfig(16, 64, 4, 3)),
        Row(64, ANY, ANY, LaunchConfig(16, 128, 4, 3)),
        Row(128, ANY, ANY, LaunchConfig(16, 64, 4, 3)),
        Row(256, ANY, ANY, LaunchConfig(16, 32, 4, 3)),
    ],
    "sm_80": [
        Row(64, ANY, ANY, LaunchConfig(16, 64, 4, 3)),
        Row(128, ANY, ANY, LaunchConfig(16, 32, 4, 3)),
        Row(256, ANY, ANY, LaunchConfig(16, 32, 4, 3)),
    ],
    # Timed on an H100 (docs/performance.md): less shared memory, more programs a core.
    # At head size 128, 32 keys and 4 warps are as fast; Triton 3.9 gives them a stack
    # frame.
    "sm_90": [
        Row(64, ANY, ANY, LaunchConfig(16, 32, 4, 3)),
        Row(128, ANY, ANY, LaunchConfig(16, 16, 2, 3)),
        Row(256, ANY, ANY, LaunchConfig(16, 32, 4, 3)),
    ],
    "hip": [
        Row(64, ANY, ANY, LaunchConfig(16, 64, 4, 3)),
        Row(128, ANY, ANY, LaunchConfig(16, 32, 4, 3)),
        Row(256, ANY, ANY, LaunchConfig(16, 16, 4, 3)),
    ],
    "interpreter": [Row(256, ANY, ANY, LaunchConfig(16, 32, 1, 1))],
}
DECODE["sm_100"] = DECODE["sm_90"]

PREFILL: dict[str, list[Row]] = {
    "cuda": [
        Row(64, ANY, ANY, LaunchConfig(64, 64, 4, 3)),
        Row(128, ANY, ANY, LaunchConfig(64, 64, 8, 3)),
        Row(256, ANY, ANY, LaunchConfig(32, 32, 8, 3)),
    ],
    "sm_80": [
        Row(64, ANY, ANY, LaunchConfig(128, 64, 8, 3)),
        Row(128, ANY, ANY, LaunchConfig(64, 64, 8, 3)),
        Row(256, ANY, ANY, LaunchConfig(64, 32, 8, 3)),
    ],
    "sm_90": [
        Row(64, ANY, ANY, LaunchConfig(128, 32, 8, 4)),
        Row(128, ANY, ANY, LaunchConfig(128, 128, 8, 3, edge_n=32)),
        Row(256, ANY, ANY, LaunchConfig(64, 32, 8, 3)),
    ],
    "sm_100": [
        Row(128, ANY, ANY, LaunchConfig(128, 64, 8, 3)),
        Row(256, ANY, ANY, LaunchConfig(64, 32, 8, 3)),
    ],
    "hip": [
        Row(64, ANY, ANY, LaunchConfig(64, 64, 4, 3)),
        Row(128, ANY, ANY, LaunchConfig(64, 32, 4, 3)),
        Row(256, ANY, ANY, LaunchConfig(64, 16, 4, 3)),
    ],
    "interpreter": [Row(256, ANY, ANY, LaunchConfig(32, 32, 1, 1))],
}

# fp32 has no matrix instruction of its full precision on CUDA: small tiles, many
# threads. At head size 256 the 64 KiB of gfx942 hold one tile ahead, not two.
FP32: dict[str, list[Row]] = {
    "cuda": [
        Row(128, ANY, ANY, LaunchConfig(32, 16, 8, 3)),
        Row(256, ANY, ANY, LaunchConfig(16, 16, 8, 3)),
    ],
    "hip": [
        Row(128, ANY, ANY, LaunchConfig(32, 16, 8, 3)),
        Row(256, ANY, ANY, LaunchConfig(16, 16, 8, 2)),
    ],
}
FP32["gfx950"] = FP32["cuda"]
# On sm_80 32 rows have a stack frame in Triton 3.9 (in 3.8 with four stages).
FP32["sm_80"] = [
    Row(128, ANY, ANY, LaunchConfig(16, 16, 8, 3)),
    Row(256, ANY, ANY, LaunchConfig(16, 16, 8, 4)),
]
# So they have on sm_120 at head size 128.
FP32["sm_120"] = [Row(256, ANY, ANY, LaunchConfig(16, 16, 8, 3))]


@functools.cache
def num_splits(num_tokens: int, budgets: tuple[int, ...], num_cores: int) -> int:
    """How many programs share one query of one KV head: a power of two.

    The machine, the (padded) batch and S + W decide, never a sequence length, so
    the number is constant inside a captured graph. As many as give every core
    ``PROGRAMS_PER_CORE``, none with less than ``KEYS_PER_SPLIT`` keys. A head that
    keeps less than others counts by its share: its later splits end at once.

    Args:
        num_tokens: T, query tokens.
        budgets: S + W of each KV head.
        num_cores: multiprocessors of the device.
    """
    longest = max(budgets)
    busy_heads = sum(budgets) / longest
    wanted = math.ceil(PROGRAMS_PER_CORE * num_cores / (num_tokens * busy_heads))
    most = min(MAX_SPLITS, max(1, longest // KEYS_PER_SPLIT))
    splits = 1
    while splits < wanted and 2 * splits <= most:
        splits *= 2
    return splits


def lookup(
    table: dict[str, list[Row]],
    target: str,
    *,
    head_size: int,
    group: int,
    budget: int,
    dtype: torch.dtype = torch.bfloat16,
) -> LaunchConfig:
    """The first row that fits; fp32 queries take a row of ``FP32`` on any GPU."""
    family = "hip" if target.startswith("gfx") else "cuda"
    if dtype == torch.float32 and target != "interpreter":
        table = FP32
    for row in table.get(target, table[family]):
        if head_size <= row.head_size and group <= row.group and budget <= row.budget:
            break
    else:
        raise ValueError(
            f"head_size must be at most 256, got {head_size}; add a row to the "
            "table in launch_config.py"
        )
    return row.config


def halve_keys(config: LaunchConfig) -> LaunchConfig:
    """For fp8 caches in decode: their conversion takes the registers of half a tile."""
    return replace(config, block_n=max(16, config.block_n // 2))


def prefill_fp8(config: LaunchConfig) -> LaunchConfig:
    """For fp8 caches in prefill: their conversion has no room beside 128 keys."""
    return replace(config, block_n=min(64, config.block_n), edge_n=0)


def num_cores(device: torch.device) -> int:
    """Multiprocessors of the device (compute units on hip)."""
    return INTERPRETER_CORES if INTERPRETED else _num_cores(device)


@functools.cache
def _num_cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def target_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` or, for kernels that Triton interprets, ``interpreter``."""
    return "interpreter" if INTERPRETED else _gpu_target(device)


@functools.cache
def _gpu_target(device: torch.device) -> str:
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
