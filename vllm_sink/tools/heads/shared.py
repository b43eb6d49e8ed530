"""Several continuations of one sequence, whose keys and values are held once.

Transformers' cache has a copy for each row of a batch. Here the layers of full
attention hand out the new tokens' keys alone, and :class:`Continuation` attends to
those and to the shared ones: eight questions about 1,024 tokens read 1,024 keys, not
8,192.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache as once
from typing import Any

import torch

from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads.call import AttentionCall, Watch

# By layer: keys and values [1, HKV, P, D].
Past = dict[int, tuple[torch.Tensor, torch.Tensor]]


@once
def _layer_class():
    """A layer of transformers' cache that hands out what is new, and holds the rest.

    Made when it is needed: transformers takes seconds to import.
    """
    from transformers.cache_utils import DynamicLayer

    class SharedLayer(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            return key_states, value_states

    return SharedLayer


def is_shared(cache) -> bool:
    """Whether no layer of the cache is copied, and none is written to."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def continued(cache, count: int, share: bool = True) -> tuple[Any, Past]:
    """A cache for ``count`` continuations, each a forward pass, and what they share.

    Args:
        cache: Transformers', of one sequence; left as it is.
        share: False for a model whose attention is not ours: each has a copy.
    """
    from transformers.cache_utils import DynamicLayer

    past: Past = {}
    result = copy.copy(cache)
    result.layers = []
    for index, layer in enumerate(cache.layers):
        if share and type(layer) is DynamicLayer and layer.get_seq_length():
            past[index] = layer.keys, layer.values
            shared = _layer_class()()
            shared.__dict__.update(layer.__dict__)
            result.layers.append(shared)
        else:
            own = copy.deepcopy(layer)
            # By the choice of beams: linear attention can't repeat a batch.
            own.reorder_cache(torch.zeros(count, dtype=torch.long))
            result.layers.append(own)
    return result, past


@dataclass
class Continuation(AttentionCall):
    """One layer's attention for B continuations of T tokens each.

    Args:
        past_key, past_value: [1, HKV, P, D], before the first token of each.
    """

    past_key: torch.Tensor
    past_value: torch.Tensor

    @property
    def first(self) -> int:
        return self.past_key.shape[2]

    def of_heads(self, kv_heads: torch.Tensor, heads: torch.Tensor) -> Continuation:
        part = super().of_heads(kv_heads, heads)
        assert isinstance(part, Continuation), "replace keeps the class"
        return replace(
            part,
            past_key=self.past_key[:, kv_heads],
            past_value=self.past_value[:, kv_heads],
        )

    def plain(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            return self._whole().plain(mask)
        return self._over(torch.arange(self.first), None)

    def streaming(self, policy: RetentionPolicy) -> torch.Tensor:
        window = max(policy.num_sink_tokens, self.first - policy.window_size + 1)
        sinks = torch.arange(min(policy.num_sink_tokens, self.first))
        return self._over(torch.cat([sinks, torch.arange(window, self.first)]), policy)

    def watch(self, watch: Watch, layer: int, start_at: int) -> None:
        self._whole().watch(watch, layer, start_at)

    def _whole(self) -> AttentionCall:
        """The call with all keys of each continuation in a row of their own."""
        rows = len(self.query)
        key, value = (
            torch.cat([past.expand(rows, -1, -1, -1), own], dim=2)
            for past, own in (
                (self.past_key, self.key),
                (self.past_value, self.value),
            )
        )
        return AttentionCall(
            self.query, key, value, self.scale, self.softcap, self.s_aux
        )

    def _over(self, chosen: torch.Tensor, policy: RetentionPolicy | None):
        """Attention to these of the past keys, and to what of its own each sees.

        The continuations are one sequence, in which none sees another.

        Returns:
            [B, T, H, D]
        """
        rows, _, count, _ = self.query.shape
        row = torch.arange(rows).repeat_interleave(count)
        position = (self.first + torch.arange(count)).repeat(rows)
        keys = torch.cat([chosen, position])
        distance = position[:, None] - keys
        seen = distance >= 0
        seen[:, len(chosen) :] &= row[:, None] == row
        if policy is not None:
            seen &= (distance < policy.window_size) | (keys < policy.num_sink_tokens)
        index: Any = slice(None)
        if len(chosen) < self.first:
            index = chosen.to(self.query.device)
        query, own_key, own_value = (
            x.transpose(0, 1).flatten(1, 2)[None]
            for x in (self.query, self.key, self.value)
        )
        key = torch.cat([self.past_key[:, :, index], own_key], dim=2)
        value = torch.cat([self.past_value[:, :, index], own_value], dim=2)
        call = AttentionCall(query, key, value, self.scale, self.softcap, self.s_aux)
        seen = seen.to(self.query.device)
        output = call.attend(0, rows * count, slice(None), seen)
        return output[0].unflatten(1, (rows, count)).permute(1, 2, 0, 3)
