"""A layer whose KV heads have caches, block tables and policies of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sink_kernels.triton.checks import (
    DTYPES,
    FP8_DTYPES,
    require,
    require_contiguous_rows,
    require_dtype,
    require_shape,
)
from vllm_sink_kernels.triton.primitives import ALIKE, APART, HEAD_COLUMNS, PACKED


def layout_of(
    k_caches: Sequence[torch.Tensor], v_caches: Sequence[torch.Tensor]
) -> int:
    """``PACKED``, ``ALIKE`` or ``APART``: what holds for each pair of caches.

    ``PACKED`` of 16-bit caches alone: it would give some of decode's fp8 (Triton 3.9)
    and fp32 (3.8) a stack frame.
    """
    pairs = list(zip(k_caches, v_caches, strict=True))
    if any(k.stride()[:-1] != v.stride()[:-1] for k, v in pairs):
        return int(APART)
    itemsize = k_caches[0].element_size()
    beside = k_caches[0].shape[-1] * itemsize
    if itemsize != 2 or any(v.data_ptr() - k.data_ptr() != beside for k, v in pairs):
        return int(ALIKE)
    return int(PACKED)


@dataclass(frozen=True)
class HeadTable:
    """One row a KV head, of addresses and numbers, on the device: see ``build``.

    A launch that reads it serves heads of any mix. The addresses are those of
    tensors that must stay where they are as long as the table is used, CUDA graphs
    that captured it included; it keeps them alive.

    Args:
        rows: int64 [HKV, HEAD_COLUMNS], those with the largest budget first: in this
            order their programs start.
        k_cache, v_cache: [B, N, 1, D] of the first head: dtype and strides of all.
        block_table: of the first head.
        slot_mapping: of the first head.
        budgets: S + W of each head.
        max_sink_tokens: the largest S.
        alignment: bytes that divide every cache's address, 16 at most.
        layout: how K and V of each head lie.
        kept: what the addresses point into.
    """

    rows: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    budgets: tuple[int, ...]
    max_sink_tokens: int
    alignment: int
    layout: int
    kept: tuple[torch.Tensor, ...]

    @classmethod
    def build(
        cls,
        k_caches: Sequence[torch.Tensor],
        v_caches: Sequence[torch.Tensor],
        block_tables: Sequence[torch.Tensor],
        slot_mappings: Sequence[torch.Tensor],
        policies: Sequence[tuple[int, int]],
    ) -> HeadTable:
        """The table of HKV heads, given by as many of each.

        One copy to the device that waits for it: build it before a CUDA graph is
        captured, not in every step.

        Args:
            k_caches, v_caches: [B, N, 1, D] each, of one dtype, N, D and strides.
            block_tables: int32 [R, max_blocks] each; heads may share one.
            slot_mappings: int64 [T] each.
            policies: (S, W) each. A head that keeps everything has S = 0 and a W
                that no distance reaches; it is never turned then.
        """
        num_heads = len(k_caches)
        for name, values in (
            ("v_caches", v_caches),
            ("block_tables", block_tables),
            ("slot_mappings", slot_mappings),
            ("policies", policies),
        ):
            require(
                len(values) == num_heads,
                name,
                f"as many as the {num_heads} k_caches",
                len(values),
                "pass one a KV head",
            )
        first = k_caches[0]
        for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
            for cache in caches:
                require_shape(name, cache, "[B, N, 1, D]", None, *first.shape[1:])
                require_shape(name, cache, "[B, N, 1, D]", None, None, 1, None)
                require_dtype(name, cache, first.dtype)
                require_contiguous_rows(name, cache)
                like = caches[0]
                require(
                    cache.stride()[:2] == like.stride()[:2],
                    name,
                    f"of one layout, strides {list(like.stride()[:2])}",
                    list(cache.stride()[:2]),
                    "allocate them alike",
                )
        require_dtype("k_caches", first, *DTYPES, *FP8_DTYPES)
        for table in block_tables:
            require_shape("block_tables", table, "[R, max_blocks]", None, None)
            require_dtype("block_tables", table, torch.int32)
            require_contiguous_rows("block_tables", table)
        for slots in slot_mappings:
            require_dtype("slot_mappings", slots, torch.int64)
            require_contiguous_rows("slot_mappings", slots)
        for num_sink_tokens, window_size in policies:
            require(
                num_sink_tokens >= 0
                and window_size >= 1
                and num_sink_tokens + window_size < 1 << 31,
                "policies",
                "(S, W) with S >= 0, W >= 1 and S + W below 2^31",
                (num_sink_tokens, window_size),
                "cap the window at the model length",
            )
        rows = [
            [
                k.data_ptr(),
                v.data_ptr(),
                table.data_ptr(),
                table.stride(0),
                num_sink_tokens,
                window_size,
                slots.data_ptr(),
                head,
            ]
            for head, k, v, table, slots, (num_sink_tokens, window_size) in zip(
                range(num_heads),
                k_caches,
                v_caches,
                block_tables,
                slot_mappings,
                policies,
                strict=True,
            )
        ]
        budgets = tuple(sinks + window for sinks, window in policies)
        rows.sort(key=lambda row: budgets[row[-1]], reverse=True)
        assert len(rows[0]) == int(HEAD_COLUMNS)
        addresses = [address for row in rows for address in row[:2]]
        return cls(
            rows=torch.tensor(rows, dtype=torch.int64, device=first.device),
            k_cache=first,
            v_cache=v_caches[0],
            block_table=block_tables[0],
            slot_mapping=slot_mappings[0],
            budgets=budgets,
            max_sink_tokens=max(sinks for sinks, _ in policies),
            alignment=min((a & -a) if a else 16 for a in [*addresses, 16]),
            layout=layout_of(k_caches, v_caches),
            kept=(*k_caches, *v_caches, *block_tables, *slot_mappings),
        )

    @property
    def num_kv_heads(self) -> int:
        return self.rows.shape[0]
