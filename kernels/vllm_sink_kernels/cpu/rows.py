"""What a step's queries look at, as the compiled loops take it.

Shape letters: T query tokens, R requests, HQ query heads, HKV KV heads, D head
size, N block size, B blocks, K kinds of KV heads.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_sink_kernels.cpu.heads import HeadCaches

# The fields of a job that :meth:`Tiles.job` fills in; strides count elements.
FIELDS = (
    "num_tiles tiles max_queries part_blocks num_kinds kinds turns half is_neox "
    "caches head_kinds block_bytes num_heads num_kv_heads head_size block_size "
    "sink_logits "
)
# Columns of ``kinds`` [K, 4] and of ``turns`` [K, 2], both int64.
TABLE, STRIDE, SINKS, WINDOW = range(4)
COS, SIN = range(2)


@dataclass(frozen=True)
class Kind:
    """A policy that KV heads share in a step, with their blocks.

    Args:
        block_table: [R, max_blocks] int32; entries in the gap may be stale and
            are not read. Kept, not copied.
        num_sink_tokens: S. window_size: W, the query's own included; one of
            max_model_len keeps everything.
    """

    block_table: torch.Tensor
    num_sink_tokens: int
    window_size: int


@dataclass(frozen=True)
class Slots:
    """Where a step's keys and values go; make it once a step.

    Args:
        tensor: [K, T] int64, of every kind a token's block * N + offset;
            negative is padding.
    """

    tensor: torch.Tensor

    @classmethod
    def of_kinds(cls, slots: Sequence[torch.Tensor]) -> Slots:
        """K tensors [T] int64."""
        return cls(slots[0][None] if len(slots) == 1 else torch.stack(tuple(slots)))

    def __post_init__(self) -> None:
        x = self.tensor
        assert x.dtype == torch.int64 and x.is_contiguous(), (x.dtype, x.stride())

    @functools.cached_property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @functools.cached_property
    def num_tokens(self) -> int:
        return self.tensor.shape[1]


@dataclass(frozen=True)
class Turns:
    """The sink turn of a step's queries; make it once a step and rotary table.

    Args:
        pairs: One a kind of the step: cos and sin [T, rotary_dim/2] float32,
            contiguous, or None for a kind whose queries stay as they are.
        is_neox: Pairs are (i, i + rotary_dim/2), else (2i, 2i + 1).
    """

    pairs: tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]
    is_neox: bool

    @functools.cached_property
    def fields(self) -> dict[str, int]:
        """What a job says of the turns."""
        widths = {pair[0].shape[1] for pair in self.pairs if pair is not None}
        assert len(widths) <= 1, f"one rotary table, several widths: {widths}"
        return dict(
            turns=self._addresses.ctypes.data,
            half=widths.pop() if widths else 0,
            is_neox=int(self.is_neox),
        )

    @functools.cached_property
    def _addresses(self) -> np.ndarray:
        return np.array(
            [[0, 0] if p is None else [x.data_ptr() for x in p] for p in self.pairs],
            np.int64,
        )


@dataclass(frozen=True)
class Size:
    """What a layer's work amounts to.

    Args:
        max_parts: Most parts of a tile's keys.
        num_rows: Most rows of a tile: its queries times HQ / HKV.
        parts_bytes: Memory of all parts' results.
        num_floats: Keys and values that are read, at most.
    """

    max_parts: int
    num_rows: int
    parts_bytes: int
    num_floats: int


@dataclass(frozen=True)
class Tiles:
    """Queries of a step, a few consecutive ones of a request at a time.

    Args:
        tiles: [tiles, 4] int64: a tile's first row among the step's tokens, its
            number of queries, their row of the block tables and the first's
            position.
        kinds: The step's kinds of KV heads.
        block_size: N, tokens.
        part_blocks: Blocks of a part of a tile's keys.
    """

    tiles: np.ndarray
    kinds: tuple[Kind, ...]
    block_size: int
    part_blocks: int
    # Jobs and scratch memory of the layer that runs; layers run one by one.
    _jobs: dict[type, ctypes.Structure] = field(default_factory=dict, repr=False)
    _zeros: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _sizes: dict[tuple, Size] = field(default_factory=dict, repr=False)

    # Once a step, not once a layer, as all that follows.
    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[T] int64, the queries' rows among the step's tokens."""
        return np.concatenate([row + np.arange(n) for row, n, _, _ in self.tiles])

    @functools.cached_property
    def max_queries(self) -> int:
        """Most queries of a tile."""
        return int(self.tiles[:, 1].max())

    @functools.cached_property
    def max_keys(self) -> tuple[int, ...]:
        """Most keys that a query sees, for every kind."""
        last = int((self.tiles[:, 1] + self.tiles[:, 3]).max())
        return tuple(min(last, k.num_sink_tokens + k.window_size) for k in self.kinds)

    @functools.cached_property
    def max_parts(self) -> tuple[int, ...]:
        """Most parts of a tile's keys, for every kind."""
        first, last = self.tiles[:, 3], self.tiles[:, 1] + self.tiles[:, 3] - 1
        return tuple(
            int(
                (
                    last // self.block_size
                    - np.maximum(first - k.window_size + 1, 0) // self.block_size
                ).max()
            )
            // self.part_blocks
            + 1
            for k in self.kinds
        )

    def size(self, caches: HeadCaches, num_heads: int) -> Size:
        """What a layer's work amounts to; computed once a step and kind of layer."""
        key = (caches.kinds, num_heads, caches.head_size)
        if key not in self._sizes:
            self._sizes[key] = self._new_size(*key)
        return self._sizes[key]

    def _new_size(self, kinds: tuple[int, ...], num_heads: int, dim: int) -> Size:
        keys = sum(self.max_keys[kind] for kind in kinds)
        parts = max(self.max_parts[kind] for kind in kinds)
        num_rows = self.max_queries * (num_heads // len(kinds))
        all_rows = len(self.tiles) * len(kinds) * num_rows
        return Size(
            max_parts=parts,
            num_rows=num_rows,
            parts_bytes=4 * parts * all_rows * (dim + 2),
            num_floats=2 * len(self.tiles) * keys * dim,
        )

    def job(
        self,
        kind: type[ctypes.Structure],
        caches: HeadCaches,
        num_heads: int,
        turns: Turns | None,
        sink_logits: torch.Tensor | None,
    ) -> Any:
        """The job of a layer; the next layer's is the same object.

        Args:
            kind: A job type with the fields :data:`FIELDS`.
            num_heads: HQ.
            sink_logits: [HQ] float32. It and the other arguments must outlive
                the job's run.
        """
        job: Any = self._jobs.get(kind)
        if job is None:
            job = self._jobs[kind] = kind(
                num_tiles=len(self.tiles),
                tiles=self.tiles.ctypes.data,
                num_kinds=len(self.kinds),
                kinds=self._kinds.ctypes.data,
                max_queries=self.max_queries,
                part_blocks=self.part_blocks,
                turns=self._no_turns.ctypes.data,
            )
        assert caches.block_size == self.block_size, caches.block_size
        for name, value in caches.fields.items():
            setattr(job, name, value)
        job.num_heads, job.half = num_heads, 0  # no turn
        if turns is not None:
            assert len(turns.pairs) == len(self.kinds), turns.pairs
            for name, value in turns.fields.items():
                setattr(job, name, value)
        job.sink_logits = 0 if sink_logits is None else sink_logits.data_ptr()
        return job

    @functools.cached_property
    def _no_turns(self) -> np.ndarray:
        return np.zeros((len(self.kinds), 2), np.int64)

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        for k in self.kinds:
            table = k.block_table
            assert table.dtype == torch.int32 and table.stride(1) == 1, table.stride()
        return np.array(
            [
                (
                    k.block_table.data_ptr(),
                    k.block_table.stride(0),
                    k.num_sink_tokens,
                    k.window_size,
                )
                for k in self.kinds
            ],
            np.int64,
        )

    def zeros(self, name: str, size: int, dtype: type) -> int:
        """The address of ``size`` numbers, zero when they are new."""
        if name not in self._zeros or self._zeros[name].size < size:
            self._zeros[name] = np.zeros(size, dtype)
        return self._zeros[name].ctypes.data

    def counter(self) -> int:
        """The address of an int64 that is zero."""
        address = self.zeros("counter", 1, np.int64)
        self._zeros["counter"][0] = 0
        return address

    def scratch(self, name: str, num_bytes: int) -> int:
        """The address of memory that starts a cache line; its numbers are anything."""
        known = getattr(_memory, name, None)
        if known is None or known.numel() < num_bytes:
            known = torch.empty(num_bytes, dtype=torch.uint8)
            setattr(_memory, name, known)
        return known.data_ptr()


# Scratch memory of the threads that run layers, kept from step to step.
_memory = threading.local()
