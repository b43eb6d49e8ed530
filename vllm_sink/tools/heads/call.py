"""One attention call, in tiles of queries: plain, streaming, or watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_sink.policy.layout import RetentionPolicy

TILE = 256  # queries at a time

Watch = Callable[[int, torch.Tensor, int], None]


@dataclass
class AttentionCall:
    """One layer's attention for one batch: [B, H, Q, D] and twice [B, HKV, K, D].

    The last query is at the last key's position. Weights are in fp32.

    Args:
        softcap: Of the scores, where the model has one.
        s_aux: [H] sink logits, where the model has them.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float | None
    s_aux: torch.Tensor | None

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def first(self) -> int:
        """Position of the first query."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The output's shape."""
        batch, heads, length, _ = self.query.shape
        return batch, length, heads, self.value.shape[-1]

    def of_heads(self, kv_heads: torch.Tensor, heads: torch.Tensor) -> AttentionCall:
        """The call of some KV heads and their query heads (bool masks)."""
        return replace(
            self,
            query=self.query[:, heads],
            key=self.key[:, kv_heads],
            value=self.value[:, kv_heads],
            s_aux=None if self.s_aux is None else self.s_aux[heads],
        )

    def plain(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Causal attention, or by the layer's own mask."""
        parts = []
        for start, stop in self._tiles():
            end = self.first + stop if mask is None else self.key.shape[2]
            keys = torch.arange(end, device=self.query.device)
            if mask is None:
                seen = keys[None] <= self._positions(start, stop)[:, None]
            else:
                seen = mask[:, :, start:stop, :end]
            parts.append(self.attend(start, stop, slice(0, end), seen))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def streaming(self, policy: RetentionPolicy) -> torch.Tensor:
        """Attention to sinks and window; the keys in the gap are not read."""
        parts = []
        for start, stop in self._tiles():
            end = self.first + stop
            window = max(0, self.first + start - policy.window_size + 1)
            if window <= policy.num_sink_tokens:
                index: Any = slice(0, end)
                keys = torch.arange(end, device=self.query.device)
            else:
                keys = torch.cat(
                    [torch.arange(policy.num_sink_tokens), torch.arange(window, end)]
                ).to(self.query.device)
                index = keys
            position = self._positions(start, stop)[:, None]
            seen = (keys[None] <= position) & (
                (keys[None] < policy.num_sink_tokens)
                | (position - keys[None] < policy.window_size)
            )
            parts.append(self.attend(start, stop, index, seen))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def watch(self, watch: Watch, layer: int, start_at: int) -> None:
        """Give ``watch`` the weights of full attention, tile by tile."""
        for start, stop in self._tiles(max(start_at - self.first, 0)):
            keys = torch.arange(self.first + stop, device=self.query.device)
            seen = keys[None] <= self._positions(start, stop)[:, None]
            weights = self._weights(start, stop, slice(0, len(keys)), seen)
            batch, heads, queries, _ = weights.shape
            shape = (batch, self.num_kv_heads, -1, queries, len(keys))
            assert heads % self.num_kv_heads == 0, "query heads share KV heads evenly"
            watch(layer, weights.view(shape), self.first + start)

    def _tiles(self, start: int = 0):
        length = self.query.shape[2]
        return [(a, min(a + TILE, length)) for a in range(start, length, TILE)]

    def _positions(self, start: int, stop: int) -> torch.Tensor:
        device = self.query.device
        return torch.arange(self.first + start, self.first + stop, device=device)

    def attend(self, start: int, stop: int, index, seen) -> torch.Tensor:
        """[B, H, stop - start, D]"""
        if self.softcap is None and self.s_aux is None:
            return scaled_dot_product_attention(
                self.query[:, :, start:stop],
                self.key[:, :, index],
                self.value[:, :, index],
                attn_mask=seen,
                scale=self.scale,
                enable_gqa=self.group > 1,
            )
        weights = self._weights(start, stop, index, seen)
        value = self.value[:, :, index].repeat_interleave(self.group, dim=1)
        return weights.to(value.dtype) @ value

    def _weights(self, start: int, stop: int, index, seen) -> torch.Tensor:
        """[B, H, stop - start, keys] fp32"""
        key = self.key[:, :, index].float().repeat_interleave(self.group, dim=1)
        scores = self.query[:, :, start:stop].float() @ key.transpose(2, 3) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.s_aux is None:
            return torch.softmax(scores, dim=-1)
        extra = self.s_aux.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
