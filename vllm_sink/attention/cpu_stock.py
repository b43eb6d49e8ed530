"""Rows that see everything, given to vLLM's own CPU kernel where it is the faster one.

Below S + W the policy is plain causal attention. Where the CPU has AMX, vLLM's kernel
is the faster one in bfloat16 as far as was measured, against our loops without tiles:
those rows of a step are its work, and the cache is written in its layout, which our
loops read for the rows that follow.
Both are tried at start: of a layout that isn't known, or a kernel that answers
otherwise than torch, nothing is borrowed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm_sink_kernels.cpu import layouts
from vllm_sink_kernels.cpu.rows import Kind

# For tests: "always" borrows on any CPU and in any dtype, "never" nowhere.
VARIABLE = "VLLM_SINK_CPU_STOCK"


@dataclass(frozen=True)
class StockKernel:
    """vLLM's kernel for a dtype, a block size and a head size.

    Args:
        isa: vLLM's name of the variant.
        layout: How it lays pages out, of ``layouts``.
    """

    isa: str
    layout: int

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Store a step's keys and values [T, HKV, D] in a cache [B, HKV, 2N, D].

        Args:
            slots: [T] int64, block * N + offset; negative is padding.
        """
        keys, values = kv_cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, self.isa)


def begun_blocks(slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """The blocks whose first slot is among a step's and whose last is not.

    vLLM's kernel multiplies what a block holds after a request's last token by a weight
    of 0. Such blocks are cleared as they are begun: what the request before left there
    may be NaN.
    """
    slots = slots[slots >= 0]
    blocks, offsets = slots // block_size, slots % block_size
    begun, full = blocks[offsets == 0], blocks[offsets == block_size - 1]
    return begun[~torch.isin(begun, full)]


def faster_kernel(
    spec: AttentionSpec, dtype: torch.dtype, impls: Iterable[Any]
) -> StockKernel | None:
    """The kernel that a group's layers borrow, or None.

    All layers of a group or none: layers that share a cache are in one.

    Args:
        spec: The group's.
        dtype: The model's.
        impls: The layers' :class:`SinkImplBase`.
    """
    for impl in impls:
        if impl.heads is not None or impl.soft_cap or impl.sink_logits is not None:
            return None
    if spec.dtype != dtype:
        return None
    return kernel_for(dtype, spec.block_size, spec.head_size)


def kernel_for(
    dtype: torch.dtype, block_size: int, head_size: int
) -> StockKernel | None:
    """vLLM's kernel for these sizes where it is faster than ours and can be read."""
    wish = os.environ.get(VARIABLE, "")
    return _faster_kernel(dtype, block_size, head_size, wish)


@functools.cache
def _faster_kernel(
    dtype: torch.dtype, block_size: int, head_size: int, wish: str
) -> StockKernel | None:
    if wish == "never":
        return None
    backend = cpu_attn.CPUAttentionBackend
    if head_size not in backend.get_supported_head_sizes() or block_size % 32:
        return None
    isa = cpu_attn._get_attn_isa(dtype, block_size, head_size)
    if isa != "amx" and wish != "always":
        return None
    layout = measured_layout(isa, dtype, block_size, head_size)
    if layout is None:
        return None
    kernel = StockKernel(isa, layout)
    return kernel if answers_right(kernel, dtype, block_size, head_size) else None


def measured_layout(
    isa: str, dtype: torch.dtype, block_size: int, head_size: int
) -> int | None:
    """The layout of a page that vLLM's kernel wrote; None: one that we can't read."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    count = block_size * head_size
    numbers = torch.arange(2 * count).to(bits)
    key, value = numbers.view(dtype).view(2, block_size, 1, head_size)
    page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    StockKernel(isa, layouts.OWN).write(key, value, page, torch.arange(block_size))
    for layout in (layouts.OWN, layouts.PLAIN, layouts.TILED):
        if layouts.fits(layout, dtype, block_size, head_size):
            expected = layouts.arrange(key[:, 0], value[:, 0], layout)
            if torch.equal(expected.view(bits), page[0, 0].view(bits)):
                return layout
    return None


def answers_right(
    kernel: StockKernel, dtype: torch.dtype, block_size: int, head_size: int
) -> bool:
    """Whether it attends as torch does on this machine: a block of tokens and more."""
    length = block_size + block_size // 2 + 1
    generator = torch.Generator().manual_seed(0)
    q, key, value = torch.randn(3, length, 2, head_size, generator=generator).to(dtype)
    pages = torch.zeros(2, 2, 2 * block_size, head_size, dtype=dtype)
    kernel.write(key, value, pages, torch.arange(length))
    kind = Kind(torch.tensor([[0, 1]], dtype=torch.int32), 0, length)
    rows = StockRows.of_step(kind, [0, length], [length])
    assert rows is not None
    out = torch.zeros_like(q)
    rows.attend(kernel, q, pages, out, scale=head_size**-0.5)
    by_head = [x.float().transpose(0, 1) for x in (q, key, value)]
    want = torch.nn.functional.scaled_dot_product_attention(
        by_head[0], by_head[1], by_head[2], is_causal=True
    ).transpose(0, 1)
    error = (out.float() - want).abs().max()
    # Weights and result are rounded; values are below 4 or so.
    return bool(error <= 8 * torch.finfo(dtype).eps + 1e-5)


@dataclass
class StockRows:
    """A step's rows that see everything: a request's first ones, for all layers.

    Args:
        counts: [R] such rows of each request.
        rows: Their place among the step's tokens.
        query_start_loc, seq_lens, block_table: Of the requests that have any, as vLLM's
            kernel takes them.
    """

    counts: list[int]
    rows: slice | torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    _schedules: dict[tuple, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of_step(
        cls, kind: Kind, starts: list[int], seq_lens: list[int]
    ) -> StockRows | None:
        """None where no row sees everything.

        Args:
            kind: The step's only one.
            starts: [R+1] offsets of the requests' query tokens.
            seq_lens: [R] tokens including this step's.
        """
        budget = kind.num_sink_tokens + kind.window_size
        counts, requests, places, lens = [], [], [], []
        for i, seq_len in enumerate(seq_lens):
            queries = starts[i + 1] - starts[i]
            first = seq_len - queries
            count = min(max(budget - first, 0), queries)
            counts.append(count)
            if count:
                requests.append(i)
                places.append((starts[i], starts[i] + count))
                lens.append(first + count)
        if not requests:
            return None
        rows: slice | torch.Tensor = slice(places[0][0], places[-1][1])
        total = sum(counts)
        if places[-1][1] - places[0][0] != total:
            rows = torch.cat([torch.arange(*place) for place in places])
        table = kind.block_table
        if len(requests) < len(table):
            table = table[requests]
        query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
        torch.cumsum(
            torch.tensor([counts[i] for i in requests]), 0, out=query_start_loc[1:]
        )
        return cls(
            counts, rows, query_start_loc, torch.tensor(lens, dtype=torch.int32), table
        )

    def attend(
        self,
        kernel: StockKernel,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
    ) -> None:
        """Plain causal attention of the rows, written into ``out`` in place.

        Args:
            q, out: [T, HQ, D], the step's.
            kv_cache: [B, HKV, 2N, D].
        """
        query = q[self.rows]
        is_copy = isinstance(self.rows, torch.Tensor)
        result = torch.empty_like(query) if is_copy else out[self.rows]
        keys, values = kv_cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=result,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0.0,
            scheduler_metadata=self._schedule(kernel, q, kv_cache),
            s_aux=None,
        )
        if is_copy:
            out[self.rows] = result

    def _schedule(
        self, kernel: StockKernel, q: torch.Tensor, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """vLLM's division of the work, made once a step and shape of layer."""
        _, num_heads, head_dim = q.shape
        key = (kernel, num_heads, kv_cache.shape[1], head_dim)
        if key not in self._schedules:
            self._schedules[key] = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(self.seq_lens),
                num_heads=num_heads,
                num_kv_heads=kv_cache.shape[1],
                head_dim=head_dim,
                seq_lens=self.seq_lens,
                dtype=q.dtype,
                query_start_loc=self.query_start_loc,
                causal=True,
                sliding_window_size=-1,
                isa=kernel.isa,
                enable_kv_split=cpu_attn.envs.VLLM_CPU_ATTN_SPLIT_KV,
            )
        return self._schedules[key]
