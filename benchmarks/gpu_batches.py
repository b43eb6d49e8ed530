"""Steps of paged requests for the GPU's check and timings (scripts/gpu_check.py).

What no query retains is NaN, and its block ids lie far outside the cache.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm_sink_kernels.triton.arguments import AttentionArgs
from vllm_sink_kernels.triton.head_table import HeadTable

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
STALE_ID = 2**31 - 1


@dataclass
class Paged:
    """One step of R requests of T query tokens; tensors on ``DEVICE``.

    Args:
        q: [T, HQ, D]. k_cache, v_cache: [B, N, HKV, D]. block_table: int32 [R, blocks].
        starts: int32 [R + 1]. lens: int32 [R]. positions, requests: int32 [T].
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    positions: torch.Tensor
    requests: torch.Tensor
    max_query_len: int
    kw: dict = field(default_factory=dict)  # more for the launchers

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.block_table

    def layer_args(self, out: torch.Tensor, **kw: Any) -> AttentionArgs:
        """The layer and the step's tokens; ``kw`` adds what ``self.kw`` lacks."""
        return AttentionArgs(*self.args, out, **(self.kw | kw))

    def safe_table(self) -> torch.Tensor:
        """The block table for kernels that may look at what they mask."""
        known = self.block_table < len(self.k_cache)
        return torch.where(known, self.block_table, 0)


def rope_table(num_rows: int, rot_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_rows, rot_dim] of cosines, then sines; theta is 10,000."""
    freqs = 1e4 ** (-torch.arange(0, rot_dim, 2, dtype=torch.float64) / rot_dim)
    angles = torch.arange(num_rows, dtype=torch.float64)[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1).to(DEVICE, dtype)


def paged(
    seq_lens: list[int],
    query_lens: list[int],
    *,
    heads: tuple[int, int],
    head_size: int,
    block_size: int,
    sinks: int,
    window: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
) -> Paged:
    """Random requests under one policy, their blocks in random order."""
    num_heads, num_kv_heads = heads
    tables, slots, num_blocks = [], [], 1  # block 0 is nobody's
    width = max(-(-n // block_size) for n in seq_lens)
    for n, m in zip(seq_lens, query_lens, strict=True):
        first = min(n, max(sinks, n - m - window + 1))
        keys = torch.cat([torch.arange(min(sinks, n)), torch.arange(first, n)])
        held = (keys // block_size).unique()
        row = torch.full((width,), STALE_ID, dtype=torch.int32)
        row[held] = torch.arange(num_blocks, num_blocks + len(held), dtype=torch.int32)
        num_blocks += len(held)
        tables.append(row)
        slots.append(row[keys // block_size].long() * block_size + keys % block_size)
    order = torch.cat([torch.zeros(1).long(), torch.randperm(num_blocks - 1) + 1])
    table = torch.stack(tables)
    known = table < num_blocks
    table[known] = order[table[known].long()].int()
    at = torch.cat(slots).to(DEVICE)
    at = order.to(DEVICE)[at // block_size] * block_size + at % block_size
    caches = []
    for _ in "kv":
        shape = num_blocks, block_size, num_kv_heads, head_size
        cache = torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)
        cache.view(-1, num_kv_heads, head_size)[at] = torch.randn(
            len(at), num_kv_heads, head_size, device=DEVICE, dtype=dtype
        )
        caches.append(cache.to(kv_dtype or dtype))
    counts = torch.tensor(query_lens)
    spans = zip(seq_lens, query_lens, strict=True)
    positions = torch.cat([torch.arange(n - m, n) for n, m in spans])
    return Paged(
        torch.randn(sum(query_lens), num_heads, head_size, device=DEVICE, dtype=dtype),
        *caches,
        table.to(DEVICE),
        torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE),
        torch.tensor(seq_lens).int().to(DEVICE),
        positions.int().to(DEVICE),
        torch.arange(len(counts)).repeat_interleave(counts).int().to(DEVICE),
        max(query_lens),
        {"num_sink_tokens": sinks, "window_size": window},
    )


def paged_heads(
    seq_lens: list[int],
    query_lens: list[int],
    policies: list[tuple[int, int]],
    *,
    group: int,
    **kw,
) -> tuple[Paged, list[Paged]]:
    """A step whose KV heads have a cache, a block table and a policy (S, W) each.

    Returns: the step, and it once more as one batch for each KV head.
    """
    parts = [
        paged(seq_lens, query_lens, heads=(group, 1), sinks=s, window=w, **kw)
        for s, w in policies
    ]
    unused = torch.zeros(len(parts[0].q), dtype=torch.int64, device=DEVICE)
    table = HeadTable.build(
        [part.k_cache for part in parts],
        [part.v_cache for part in parts],
        [part.block_table for part in parts],
        [unused] * len(parts),  # nothing is written
        policies,
    )
    step = replace(
        parts[0],
        q=torch.cat([part.q for part in parts], dim=1),
        kw={"num_sink_tokens": 0, "window_size": 1, "heads": table},  # its own count
    )
    return step, parts
