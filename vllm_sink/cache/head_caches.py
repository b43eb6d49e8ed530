"""KV caches of single heads, for layers whose heads have two policies.

Where a layer has heads of both kinds, each of its local KV heads gets a *companion*
(:class:`HeadCache`): an entry of vLLM's ``static_forward_context`` that is no module
and computes nothing. It has a KV cache spec of one head, and vLLM's own grouping of
hybrid models gives it a group, a block table and a cache::

    Attention "…layers.3.self_attn.attn"   no cache of its own
      "…attn_kv0"  HeadCache, streaming    group 1, cache [B, 1, N, 2D]
      "…attn_kv1"  HeadCache, retrieval    group 0
      "…attn_kv2"  HeadCache, streaming    group 2

Nothing of vLLM is patched. vLLM needs to be told:

* The module "shares" the KV cache of its first companion, vLLM's cross-layer
  sharing: that gives it metadata and no memory.
* A companion is named by the GLOBAL head. Tensor-parallel ranks that hold different
  heads then look like pipeline stages, which vLLM's grouping handles.
* vLLM reads a layer's index from its name and accepts one number between dots.
* Its grouping takes the smaller kind's size for all groups and deals heads out in
  turn. :class:`Padding` fills every worker's groups up to one size
  (:mod:`vllm_sink.policy.grouping`), so every worker gets the same groups. A drafter's
  heads are dealt to one of them (:mod:`vllm_sink.cache.draft_heads`).

Where no layer has heads of both kinds there are no companions: the layers' own
specs differ, and padding alone is added.

So it is where the policy governs every layer; a model that has other layers beside
them is the work of :mod:`vllm_sink.cache.head_slots`.

A forward of the layer finds its heads in ``impl.heads`` and its step in the
metadata: ``metadata.step.parts[head.group.index]`` is what the builder of the
head's group made of this step. See :mod:`vllm_sink.attention.base`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_sink.cache.workers import workers_of
from vllm_sink.engine import Engine
from vllm_sink.policy.grouping import Grouping, heads_held
from vllm_sink.policy.head_map import HeadMap


@dataclass(eq=False)
class HeadGroup:
    """The heads of one KV cache group.

    Args:
        heads: Its companions, padding included.
        index: Its place among the engine's groups of heads.
    """

    heads: tuple[HeadCache, ...]
    index: int


@dataclass(eq=False)
class HeadGroups:
    """The groups of heads of one engine, in the order of their builders.

    Args:
        grouping: What vLLM's grouping comes to.
        first: The layer with which they began.
        groups: Filled as vLLM makes the groups' metadata builders.
        step: The step that these are building; the attention room's.
        drafted: Names of a drafter's entries, which vLLM deals to one group.
    """

    grouping: Grouping
    first: Any = None
    groups: list[HeadGroup] = field(default_factory=list)
    step: Any = None
    drafted: list[str] = field(default_factory=list)

    def register(self, heads: Iterable[HeadCache]) -> HeadGroup:
        """The group of these heads, made if need be.

        A builder may be made twice, and a drafter has builders of its own.
        """
        heads = tuple(heads)
        for group in self.groups:
            if set(heads) <= set(group.heads):
                return group
            assert not set(group.heads) & set(heads), "a head is in one group"
        group = HeadGroup(heads, len(self.groups))
        self.groups.append(group)
        for head in heads:
            head.group = group
        return group


class HeadCache(AttentionLayerBase):
    """The KV cache of one KV head: a layer to the allocator, no module.

    Args:
        name: Its layer name.
        owner: The attention module whose head it is.
        is_retrieval: Its kind.
        backend: The backend class, which gives the spec its policy.
        groups: The engine's.
        is_drafters: Its owner is a drafter's.
    """

    group: HeadGroup
    kv_cache: torch.Tensor  # [B, 1, N, 2D], bound by vLLM

    def __init__(
        self,
        name: str,
        owner: Attention,
        is_retrieval: bool,
        backend: type,
        groups: HeadGroups,
        *,
        is_drafters: bool = False,
    ) -> None:
        self.layer_name = name
        self.owner = owner
        self.is_retrieval = is_retrieval
        self.attn_backend = backend
        self.groups = groups
        self.is_drafters = is_drafters
        self.kv_cache = torch.tensor([])
        # vLLM makes a metadata builder for each (backend, spec, num_heads): as the
        # owner's, which is in its first companion's group, so that one does.
        self.num_heads = owner.num_heads
        self.impl = owner.impl

    @property
    def entry(self) -> HeadCache:
        """What vLLM knows of it."""
        return self

    @property
    def owners(self) -> tuple[Attention, ...]:
        """The attention modules that read it; none of padding."""
        return (self.owner,)

    def get_attn_backend(self) -> type:
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = head_spec(self.owner.get_kv_cache_spec(vllm_config))
        assert type(spec) is FullAttentionSpec, spec
        return spec


def head_spec(spec: Any) -> Any:
    """The KV cache spec of one head of a layer."""
    return replace(spec, num_kv_heads=1)


class Padding(HeadCache):
    """A place in a group without a head: it has no tensor, nothing is written."""

    @property
    def owners(self) -> tuple[Attention, ...]:
        return ()


class LayerPadding(Padding):
    """A place in a group of whole layers."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = self.owner.get_kv_cache_spec(vllm_config)
        assert spec is not None
        return spec


def add_companions(
    engine: Engine,
    layer: Attention,
    heads: HeadMap,
    backend: type,
    retrieval_backend: type,
) -> None:
    """Give a new layer a companion for each KV head, or a policy as a whole.

    Args:
        layer: Registered in the current config's ``static_forward_context``.
        heads: The whole model's.
        backend, retrieval_backend: Of streaming heads and of retrieval heads.
    """
    vllm_config = get_current_vllm_config()
    context = vllm_config.compilation_config.static_forward_context
    name = layer.layer_name
    index = extract_layer_index(name)
    refuse_layer(layer, index, heads)
    is_retrieval = heads.is_retrieval[index]

    def backend_of(kind: bool) -> type:
        return retrieval_backend if kind else backend

    # Read by vLLM later, through get_attn_backend(): a class for a kind of spec.
    layer.attn_backend = backend_of(is_retrieval[0])
    if heads.is_uniform:
        return
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    rank = get_tensor_model_parallel_rank() if num_ranks > 1 else 0
    stage = get_pp_group().rank_in_group if num_stages > 1 else 0
    held = heads_held(heads, num_ranks, rank)
    is_first = engine.head_groups is None
    workers = workers_of(engine.vllm_config, heads)
    groups = engine.head_groups or HeadGroups(workers.grouping, layer)
    engine.head_groups = layer.impl.groups = groups
    companions = []
    if heads.splits_layers:
        companions = [
            HeadCache(
                f"{name}_kv{head}",
                layer,
                is_retrieval[head],
                backend_of(is_retrieval[head]),
                groups,
            )
            for head in held
        ]
        give_heads(layer, companions)
    paddings = []
    if is_first:
        missing = groups.grouping.padding(*workers.counts[stage, held])
        for kind, count in zip((True, False), missing, strict=True):
            # The same name on ranks that hold the same heads.
            prefix = f"{name}_padding{held.start}_{int(kind)}_"
            kind_of_padding = Padding if heads.splits_layers else LayerPadding
            paddings += [
                kind_of_padding(f"{prefix}{i}", layer, kind, backend_of(kind), groups)
                for i in range(count)
            ]
    for companion in (*companions, *paddings):
        assert companion.layer_name not in context, companion.layer_name
        context[companion.layer_name] = companion


def give_heads(layer: Attention, companions: Sequence[HeadCache]) -> None:
    """Let a layer have its companions' caches, in place of one of its own."""
    assert len(companions) == layer.num_kv_heads, (companions, layer.num_kv_heads)
    layer.attn_backend = companions[0].attn_backend
    layer.kv_sharing_target_layer_name = companions[0].layer_name
    layer.impl.heads = tuple(companions)


def refuse_layer(layer: Attention, index: int, heads: HeadMap) -> None:
    """Refuse a layer that is not of the kind which the map takes it for, by name.

    Raises:
        ValueError: Names the layer and the remedy.
    """
    is_known = index < heads.num_layers
    has_heads = is_known and bool(heads.is_retrieval[index])
    is_full = layer.sliding_window is None
    owns = layer.kv_sharing_target_layer_name is None
    reasons = {
        f"index {index} in a map of {heads.num_layers} layers": not is_known,
        f"a window of its own ({layer.sliding_window}), where config.json says none": (
            has_heads and not is_full
        ),
        "the KV cache of another layer, where config.json says none": (
            has_heads and not owns
        ),
        "full attention, where config.json says otherwise": (
            is_known and not has_heads and is_full and owns
        ),
    }
    for reason, is_refused in reasons.items():
        if is_refused:
            raise ValueError(
                "sink.retrieval_heads must be left out for a model with layers that "
                f"the map can't describe, got {layer.layer_name} with {reason}; leave "
                "sink.retrieval_heads and sink.retrieval_layers out"
            )
