"""Where each KV head of a layer is kept, and under which policy: made once.

Shape letters: HKV KV heads, D head size, N block size, B blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sink_kernels.cpu.layouts import OWN, fits


@dataclass(frozen=True)
class HeadCaches:
    """The caches of a layer's KV heads; make it once a layer, not once a step.

    Args:
        tensors: HKV tensors [B, 2N, D] float32, bfloat16 or float16, of one
            dtype and stride, a block's page consecutive. They may be views of one
            tensor or memory of their own.
        kinds: [HKV], each head's place in the ``kinds`` of a step's plan.
        layout: How the pages' numbers stand, of :mod:`layouts`.
    """

    tensors: tuple[torch.Tensor, ...]
    kinds: tuple[int, ...]
    layout: int = OWN

    def __post_init__(self) -> None:
        first = self.tensors[0]
        assert len(self.tensors) == len(self.kinds), (len(self.tensors), self.kinds)
        for x in self.tensors:
            assert (x.dtype, x.stride()) == (first.dtype, first.stride())
            assert x.shape[1:] == first.shape[1:], (x.shape, first.shape)
        assert first.dtype != torch.bfloat16 or self.head_size % 2 == 0, first.shape
        assert first.stride()[1:] == (first.shape[2], 1), first.stride()
        assert fits(self.layout, self.dtype, self.block_size, self.head_size), self

    @classmethod
    def of_layer(cls, kv_cache: torch.Tensor, layout: int = OWN) -> HeadCaches:
        """All heads of one tensor [B, HKV, 2N, D], of one kind."""
        return cls(kv_cache.unbind(1), (0,) * kv_cache.shape[1], layout)

    @classmethod
    def of_heads(
        cls, kv_caches: Sequence[torch.Tensor], kinds: Sequence[int]
    ) -> HeadCaches:
        """Heads that have tensors [B, 1, 2N, D] of their own."""
        return cls(tuple(x.squeeze(1) for x in kv_caches), tuple(kinds))

    @property
    def num_heads(self) -> int:
        """HKV."""
        return len(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def head_size(self) -> int:
        """D."""
        return self.tensors[0].shape[2]

    @property
    def block_size(self) -> int:
        """N, tokens."""
        return self.tensors[0].shape[1] // 2

    @functools.cached_property
    def fields(self) -> dict[str, int]:
        """What a job says of the caches."""
        return dict(
            caches=self._addresses.ctypes.data,
            head_kinds=self._kinds.ctypes.data,
            block_bytes=self.tensors[0].stride(0) * self.dtype.itemsize,
            num_kv_heads=self.num_heads,
            head_size=self.head_size,
            block_size=self.block_size,
        )

    @functools.cached_property
    def _addresses(self) -> np.ndarray:
        return np.array([x.data_ptr() for x in self.tensors], np.int64)

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        return np.array(self.kinds, np.int64)
