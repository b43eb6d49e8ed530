"""The slots of a worker's heads (:mod:`vllm_sink.cache.head_slots`): how many, whose.

Layers get slots as they are built, more than are needed; which heads are in which, and
in which group, is planned once all layers are there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_sink.cache.head_caches import HeadGroups, refuse_layer
from vllm_sink.cache.head_slots import HeadSlot, SlottedHead
from vllm_sink.cache.layers_beside import Spec, find_layers_beside, in_page
from vllm_sink.cache.spec import SlotSpec
from vllm_sink.cache.workers import draft_heads, stages_of
from vllm_sink.engine import Engine
from vllm_sink.policy.draft_heads import DraftHeads
from vllm_sink.policy.grouping import heads_held
from vllm_sink.policy.head_map import HeadMap
from vllm_sink.policy.layout import cdiv
from vllm_sink.policy.slot_workers import (
    SlotHeads,
    SlotWorkers,
    is_divided,
    slots_of_workers,
)
from vllm_sink.policy.slots import SlotGrouping, SlotMemory, choose_slots, slots_of


@dataclass(eq=False)
class SlotGroups(HeadGroups):
    """The slots and groups of heads of one engine, on one worker.

    Args:
        engine: The engine's record.
        heads: The whole model's.
        worker: The worker's stage, and the heads of each layer that it holds.
        workers: The heads of every worker.
        stages: The layers of each pipeline stage.
        draft: The heads of the engine's drafter, if it has any.

    Attributes:
        layers: Governed layers that have keys of their own.
        drafters: A drafter's layers.
        slots: By kind.
    """

    grouping: Any = None  # of the plan
    engine: Engine | None = None
    heads: HeadMap = field(default_factory=lambda: HeadMap(()))
    worker: tuple[int, range] = (0, range(0))
    workers: SlotWorkers = field(default_factory=dict)
    stages: list[range] = field(default_factory=list)
    draft: DraftHeads | None = None
    layers: list[Attention] = field(default_factory=list)
    drafters: list[Attention] = field(default_factory=list)
    slots: dict[bool, list[HeadSlot]] = field(default_factory=dict)
    _plan: SlotMemory | None = None
    _is_planning: bool = False

    @property
    def held(self) -> SlotHeads:
        """The worker's heads."""
        return self.workers[self.worker]

    @property
    def is_divided(self) -> bool:
        """Whether slots hold heads, and not whole layers."""
        return is_divided(self.heads, len(self.stages), self.draft)

    @property
    def first_kind(self) -> bool:
        """The kind of the slot whose metadata the layers get."""
        return self.held.retrieval > 0

    def plan(self, vllm_config: VllmConfig) -> SlotMemory:
        """Where each head is kept: made when vLLM first asks for a slot's spec.

        Once: vLLM settles its block size before, and changes it again after, to the
        smallest of the groups'.
        """
        if self._plan is None:
            self._is_planning = True
            self._plan = make_plan(self, vllm_config)
            self._is_planning = False
            self._fill_slots(self._plan.grouping)
        return self._plan

    def paged_spec(self, spec: Spec, vllm_config: VllmConfig) -> Spec:
        """The spec of a layer that has its own cache, in a page like all others.

        So vLLM makes it where layers are outermost in memory. Where blocks are, it
        packs pages that differ in size, in other groups than these.
        """
        if self._is_planning:
            return spec
        return in_page(spec, self.plan(vllm_config).page_bytes)

    def _fill_slots(self, grouping: SlotGrouping) -> None:
        if not self.is_divided:
            return
        share = grouping.heads_per_slot
        for kind, slots in self.slots.items():
            mine, drafted = (
                [head for head in heads_of(layers) if head.is_retrieval == kind]
                for layers in (self.layers, self.drafters)
            )
            needed = slots[: grouping.num_slots(kind)]
            used = _put(mine, needed, share)
            # The last slots are of one group, and of one block table.
            last = len(needed) - cdiv(len(drafted), share)
            assert used <= last, "as many slots as heads, and more"
            _put(drafted, needed[last:], share)
        for layer in self.drafters:
            own = [head.slot for head in layer.impl.heads]
            assert len({slot.index // grouping.size for slot in own}) == 1, own
            layer.kv_sharing_target_layer_name = own[0].layer_name
            for slot in own:
                slot.belong_to(layer)
                slot.is_draft_layer = True  # vLLM 0.33 puts it into the spec

    def slot_spec(self, slot: HeadSlot, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The spec of a slot, before it gets its policy; None: it is not needed."""
        plan = self.plan(vllm_config)
        grouping = plan.grouping
        layer = self.layers[0].get_kv_cache_spec(vllm_config)
        if not self.is_divided:
            filled = self.held.counts[0 if slot.is_retrieval else 1]
            needed = grouping.num_slots(slot.is_retrieval) - filled
            return layer if slot.index < needed else None
        if slot.index >= grouping.num_slots(slot.is_retrieval):
            return None
        assert type(layer) is FullAttentionSpec, layer
        known = {entry.name: getattr(layer, entry.name) for entry in fields(layer)}
        known |= {
            "num_kv_heads": grouping.heads_per_slot,
            "block_size": grouping.tokens_per_block,
            "page_size_padded": (plan.page_bytes if plan.padding_bytes else None),
        }
        return SlotSpec(**known, part=slot.index // grouping.size)


def heads_of(layers: list[Attention]) -> list[SlottedHead]:
    """The heads of layers, in order."""
    return [head for layer in layers for head in layer.impl.heads]


def _put(heads: list[SlottedHead], slots: list[HeadSlot], share: int) -> int:
    """Put so many heads into each slot; returns how many slots it took."""
    for i, head in enumerate(heads):
        head.slot, head.place = slots[i // share], i % share
        head.slot.heads = (*head.slot.heads, head)
    return cdiv(len(heads), share)


def make_plan(groups: SlotGroups, vllm_config: VllmConfig) -> SlotMemory:
    """Groups, slots and a request's memory of a worker whose layers are all built."""
    assert groups.engine is not None
    config = groups.engine.config
    spec = groups.layers[0].get_kv_cache_spec(vllm_config)
    assert isinstance(spec, FullAttentionSpec), spec
    unit_bytes = spec.unpadded_page_size_bytes // spec.block_size
    if groups.is_divided:
        unit_bytes //= spec.num_kv_heads
    governed = [*groups.layers, *(slot for x in groups.slots.values() for slot in x)]
    stage, _ = groups.worker
    beside = find_layers_beside(
        vllm_config, set(governed), spec.page_size_bytes, groups.stages, stage
    )
    whole_block = in_page(spec, beside.page_bytes).block_size
    slots = [(1, whole_block)]
    if groups.is_divided:
        slots = list(slots_of(beside.page_bytes, unit_bytes, spec.block_size))
    grouping = choose_slots(
        groups.workers.values(),
        beside.layers,
        config.policy,
        config.retrieval_policy,
        slots=slots,
        is_divided=groups.is_divided,
        num_stages=len(groups.stages),
    )
    everywhere = 0
    if len(groups.stages) > 1:
        everywhere = groups.heads.num_governed_layers
        everywhere += groups.draft.num_layers if groups.draft else 0
    return SlotMemory(
        grouping=grouping,
        page_bytes=beside.page_bytes,
        unit_bytes=unit_bytes,
        counts=groups.held.counts,
        streaming=config.policy,
        retrieval=config.retrieval_policy,
        beside=beside.layers,
        whole_layers=len(groups.layers) + len(groups.drafters),
        whole_block=whole_block,
        whole_everywhere=everywhere,
    )


def add_slots(
    engine: Engine,
    layer: Attention,
    heads: HeadMap,
    backend: type,
    retrieval_backend: type,
) -> None:
    """Give a new layer's heads caches of their own, or the layer a policy as a whole.

    Args:
        layer: Registered in the current config's ``static_forward_context``.
        heads: The whole model's.
        backend, retrieval_backend: Of streaming heads and of retrieval heads.
    """
    vllm_config = get_current_vllm_config()
    index = extract_layer_index(layer.layer_name)
    refuse_layer(layer, index, heads)
    if layer.sliding_window is not None:
        layer.attn_backend = backend
        return

    def backend_of(kind: bool) -> type:
        return retrieval_backend if kind else backend

    context = vllm_config.compilation_config.static_forward_context
    if (target := layer.kv_sharing_target_layer_name) is not None:
        _follow(layer, context[target])
        return
    is_retrieval = heads.is_retrieval[index]
    # Read by vLLM later, through get_attn_backend(): a class for a kind of spec.
    layer.attn_backend = backend_of(is_retrieval[0])
    if heads.is_uniform:
        return
    groups: SlotGroups | None = engine.head_groups
    if groups is None:
        groups = _make_groups(engine, layer, heads)
        engine.head_groups = groups
        _add_slots(groups, layer.layer_name, backend_of, context)
    else:
        groups.layers.append(layer)
    if not groups.is_divided:
        return
    first = groups.slots[groups.first_kind][0]
    layer.attn_backend = first.attn_backend
    layer.kv_sharing_target_layer_name = first.layer_name
    layer.impl.heads = tuple(
        SlottedHead(layer, is_retrieval[head]) for head in groups.worker[1]
    )


def _make_groups(engine: Engine, layer: Attention, heads: HeadMap) -> SlotGroups:
    """The groups of a worker whose first governed layer is ``layer``."""
    vllm_config = engine.vllm_config
    stages = stages_of(vllm_config, heads.num_layers)
    draft = draft_heads(vllm_config)
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    rank = get_tensor_model_parallel_rank() if num_ranks > 1 else 0
    stage = get_pp_group().rank_in_group if len(stages) > 1 else 0
    divided = is_divided(heads, len(stages), draft)
    return SlotGroups(
        engine=engine,
        heads=heads,
        worker=(stage, heads_held(heads, num_ranks, rank, is_divided=divided)),
        workers=slots_of_workers(heads, num_ranks, stages, draft),
        stages=stages,
        draft=draft,
        layers=[layer],
    )


def _add_slots(groups: SlotGroups, name: str, backend_of: Any, context: dict) -> None:
    """Enter slots, of which as many have caches as a later plan needs."""
    counts = [count for heads in groups.workers.values() for count in heads.counts]
    # A plan rounds up to whole groups, which are no larger than a kind of heads or of
    # other layers is numerous.
    most = 2 * max(counts) + groups.heads.num_layers
    for kind, word in ((True, "retrieval"), (False, "streaming")):
        groups.slots[kind] = [
            HeadSlot(f"{name}_{word}{i}", groups, kind, i, backend_of(kind))
            for i in range(most)
        ]
        for slot in groups.slots[kind]:
            assert slot.layer_name not in context, slot.layer_name
            context[slot.layer_name] = slot


def _follow(layer: Attention, owner: Attention) -> None:
    """Let a layer that reads another's keys follow that one's heads."""
    layer.attn_backend = owner.attn_backend
    if owner.impl.heads is None:
        return
    layer.kv_sharing_target_layer_name = owner.kv_sharing_target_layer_name
    layer.impl.heads = owner.impl.heads
    for head in owner.impl.heads:
        head.readers.append(layer)
