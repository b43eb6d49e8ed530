"""A drafter's heads in slots: :mod:`vllm_sink.cache.draft_heads`, beside other layers.

vLLM's runner V1 tells a drafter's layers by their names, all that are new once it is
built, before any block size is settled. So a drafter adds its own layers alone, which
"share" the cache of slots that the model brought; which slots, the plan tells.
"""

from __future__ import annotations

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_sink.cache.draft_heads import refuse_other_pages
from vllm_sink.cache.head_slots import SlottedHead
from vllm_sink.cache.slot_groups import SlotGroups
from vllm_sink.cache.workers import draft_heads
from vllm_sink.engine import Engine
from vllm_sink.policy.head_map import HeadMap, heads_of_rank


def add_drafter_slots(
    engine: Engine,
    layer: Attention,
    heads: HeadMap,
    backend: type,
    retrieval_backend: type,
) -> None:
    """Put the heads of a drafter's new layer into slots, all of them of one kind.

    Args: those of :func:`vllm_sink.cache.draft_heads.add_drafters`.
    """
    if heads.is_uniform:
        layer.attn_backend = retrieval_backend
        return
    draft = draft_heads(engine.vllm_config)
    assert draft is not None, "the start refuses other drafters"
    groups: SlotGroups | None = engine.head_groups
    assert groups is not None, "a drafter is built after the model"
    refuse_other_pages(layer, groups.layers[0], is_split=True)
    slots = groups.slots[draft.is_retrieval]
    layer.attn_backend = retrieval_backend if draft.is_retrieval else backend
    layer.kv_sharing_target_layer_name = slots[0].layer_name  # until there is a plan
    num_ranks = engine.vllm_config.parallel_config.tensor_parallel_size
    held = heads_of_rank(0, num_ranks, draft.num_kv_heads)  # as many on each rank
    assert len(held) == layer.num_kv_heads, (held, layer.num_kv_heads)
    layer.impl.heads = tuple(
        SlottedHead(layer, draft.is_retrieval, is_drafters=True) for _ in held
    )
    groups.drafters.append(layer)
    assert len(groups.drafters) <= draft.num_layers, "as many as the config counts"
    # vLLM 0.32 takes the group of the last entry for an MTP drafter's.
    context = get_current_vllm_config().compilation_config.static_forward_context
    for slot in slots:
        context[slot.layer_name] = context.pop(slot.layer_name)
