"""KV caches of heads of two policies, in a model with other layers beside.

As :mod:`vllm_sink.cache.head_caches`, but the pool of blocks is shared with layers
that the policy doesn't govern: windows of the model's own, states. All pages are then
as large as theirs. The heads of a worker, of all governed layers, are put into *slots*
(:class:`HeadSlot`), entries of vLLM's ``static_forward_context`` that are no modules
and compute nothing; a slot is a page of some heads for some tokens::

    Attention "…layers.3.self_attn.attn"   no cache of its own
      head 0  SlottedHead, streaming       in slot "…attn_streaming7",  group 1
      head 1  SlottedHead, retrieval       in slot "…attn_retrieval2",  group 0
      head 2  SlottedHead, streaming       in slot "…attn_streaming7",  group 1

    a slot's cache [B, heads of a slot, N, 2D]

* All governed layers "share" the KV cache of the first slot that has heads, vLLM's
  cross-layer sharing: that gives them metadata and no memory.
* Slots are named alike on all tensor-parallel ranks, whatever heads these hold, and
  there are as many on each: ranks look alike to vLLM. Pipeline stages have slots of
  other names, as many of each kind.
* A drafter's heads are in slots of their own (:mod:`vllm_sink.cache.draft_slots`).
* A slot's spec says which group of its kind it is in (``part``): to vLLM's grouping
  these are layers of several kinds, and it makes a group of each.
* How many layers there are beside, and of which page, is known when vLLM asks for
  specs, after the model is built, so that is when heads get slots. A slot that is not
  needed says that it has no cache.

Where no layer has heads of both kinds, on one stage and without a drafter, no head has
a slot: the layers' own specs differ, and slots without heads are mere padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_sink.cache.head_caches import HeadGroup

if TYPE_CHECKING:
    from vllm_sink.cache.slot_groups import SlotGroups


class SlottedHead:
    """Where one KV head of a layer is kept.

    Args:
        layer: The attention module whose head it is.
        is_retrieval: Its kind.
        is_drafters: Its layer is a drafter's.

    Attributes:
        slot: Where it is kept, once heads have slots.
        place: Its place among the slot's heads.
        readers: The modules that read it: its own first.
    """

    slot: HeadSlot
    place: int

    def __init__(
        self, layer: Attention, is_retrieval: bool, *, is_drafters: bool = False
    ) -> None:
        self.readers = [layer]
        self.is_retrieval = is_retrieval
        self.is_drafters = is_drafters
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def entry(self) -> HeadSlot:
        """What vLLM knows of it."""
        return self.slot

    @property
    def group(self) -> HeadGroup:
        return self.slot.group

    @property
    def kv_cache(self) -> torch.Tensor:
        """[B, 1, N, 2D], a view of the slot's."""
        whole = self.slot.kv_cache
        if self._views is None or self._views[0] is not whole:
            self._views = whole, whole[:, self.place : self.place + 1]
        return self._views[1]


class HeadSlot(AttentionLayerBase):
    """A KV cache of some heads of one kind: a layer to the allocator, no module.

    Args:
        name: Its layer name.
        groups: The engine's.
        is_retrieval: The kind of its heads.
        index: Its place among the slots of its kind.
        backend: The backend class, which gives the spec its policy.

    Attributes:
        heads: The heads in it; none where it is padding.
    """

    group: HeadGroup
    kv_cache: torch.Tensor  # [B, heads, N, 2D], bound by vLLM

    def __init__(
        self,
        name: str,
        groups: SlotGroups,
        is_retrieval: bool,
        index: int,
        backend: type,
    ) -> None:
        self.layer_name = name
        self.groups = groups
        self.is_retrieval = is_retrieval
        self.index = index
        self.attn_backend = backend
        self.heads: tuple[SlottedHead, ...] = ()
        self.kv_cache = torch.tensor([])
        self.belong_to(groups.layers[0])

    def belong_to(self, layer: Attention) -> None:
        """Look like a layer that reads this slot's heads.

        vLLM makes a metadata builder for each (backend, spec, num_heads): as the
        layers', which are in the first slot's group, so that one does.
        """
        self.num_heads = layer.num_heads
        self.impl = layer.impl

    @property
    def owners(self) -> tuple[Attention, ...]:
        """The attention modules that read it; none of padding."""
        return tuple(dict.fromkeys(x for head in self.heads for x in head.readers))

    @property
    def is_drafters(self) -> bool:
        """Whether all of its heads are a drafter's."""
        return bool(self.heads) and all(head.is_drafters for head in self.heads)

    def get_attn_backend(self) -> type:
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The spec of its heads; None where the slot is not needed."""
        return self.groups.slot_spec(self, vllm_config)
