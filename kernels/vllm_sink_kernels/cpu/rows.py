"""What a step's queries look at, as the compiled loops take it.

Shape letters: T query tokens, R requests, HQ query heads, HKV KV heads, D head
size, N block size, B blocks.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# The fields of a job that :meth:`Rows.job` fills in; strides count elements.
FIELDS = (
    "num_tokens rows requests positions block_table table_stride num_sink_tokens "
    "window_size kv_cache num_heads num_kv_heads head_size block_size "
    "cos sin half is_neox sink_logits "
)


@dataclass(frozen=True)
class Rows:
    """Query rows of a step and what they look at, for all layers.

    Args:
        rows: [T] int64, the queries' rows among the step's tokens.
        requests: [T] int64, their rows of the block table.
        positions: [T] int64.
        block_table: [R, max_blocks] int32; the gap's entries are not read.
        num_sink_tokens: S. window_size: W, the query's own included.
    """

    rows: np.ndarray
    requests: np.ndarray
    positions: np.ndarray
    block_table: np.ndarray
    num_sink_tokens: int
    window_size: int
    # Jobs and scratch memory of the layer that runs; layers run one by one.
    _jobs: dict[type, ctypes.Structure] = field(default_factory=dict, repr=False)
    _scratch: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @functools.cached_property  # once a step, not once a layer
    def max_keys(self) -> int:
        """Most keys that a query of these sees."""
        budget = self.num_sink_tokens + self.window_size
        return min(int(self.positions.max()) + 1, budget)

    def job(
        self,
        kind: type[ctypes.Structure],
        kv_cache: torch.Tensor,
        num_heads: int,
        turn: tuple[torch.Tensor, torch.Tensor, bool] | None,
        sink_logits: torch.Tensor | None,
    ) -> Any:
        """The job of a layer; the next layer's is the same object.

        Args:
            kind: A job type with the fields :data:`FIELDS`.
            kv_cache: [B, HKV, 2N, D], contiguous.
            num_heads: HQ.
            turn: cos and sin [T, rotary_dim/2], contiguous, and is_neox.
            sink_logits: [HQ] float32. It and the other tensors must outlive
                the job's run.
        """
        job: Any = self._jobs.get(kind)
        if job is None:
            job = self._jobs[kind] = self._new_job(kind)
        assert kv_cache.is_contiguous(), kv_cache.stride()
        job.kv_cache = kv_cache.data_ptr()
        _, job.num_kv_heads, width, job.head_size = kv_cache.shape
        job.block_size, job.num_heads = width // 2, num_heads
        job.half = 0
        if turn is not None:
            cos, sin, job.is_neox = turn
            job.cos, job.sin, job.half = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        job.sink_logits = 0 if sink_logits is None else sink_logits.data_ptr()
        return job

    def _new_job(self, kind: type[ctypes.Structure]) -> ctypes.Structure:
        table = self.block_table
        assert table.dtype == np.int32 and table.strides[1] == 4, table.strides
        return kind(
            num_tokens=len(self.rows),
            rows=self.rows.ctypes.data,
            requests=self.requests.ctypes.data,
            positions=self.positions.ctypes.data,
            block_table=table.ctypes.data,
            table_stride=table.strides[0] // 4,
            num_sink_tokens=self.num_sink_tokens,
            window_size=self.window_size,
        )

    def zeros(self, name: str, size: int, dtype: type) -> int:
        """The address of ``size`` numbers, zero when they are new."""
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = np.zeros(size, dtype)
        return self._scratch[name].ctypes.data
