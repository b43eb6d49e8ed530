"""KV caches of a drafter's heads beside retrieval heads: all in one group.

vLLM's runner V1 hands all of a drafter's layers the block table of one group, and
builds metadata for that group alone while it drafts; runner V2 then plans one group a
draft. :mod:`vllm_sink.policy.draft_heads` tells their kind.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention

from vllm_sink.cache.head_caches import HeadCache, HeadGroups, give_heads, head_spec
from vllm_sink.cache.workers import draft_heads
from vllm_sink.engine import Engine
from vllm_sink.policy.grouping import heads_held
from vllm_sink.policy.head_map import HeadMap, heads_of_rank

BESIDE = "with sink.retrieval_heads or sink.retrieval_layers"
DRAFT_OTHERWISE = "draft with n-grams or drop --speculative-config"


def add_drafters(
    engine: Engine,
    layer: Attention,
    heads: HeadMap,
    backend: type,
    retrieval_backend: type,
) -> None:
    """Enter a new layer of a drafter into the groups, all of its heads of one kind.

    Args:
        layer: Registered in vLLM's ``static_forward_context``.
        heads: The served model's.
        backend, retrieval_backend: Of streaming heads and of retrieval heads.
    """
    vllm_config = engine.vllm_config
    if heads.is_uniform:
        layer.attn_backend = retrieval_backend
        return
    draft = draft_heads(vllm_config)
    assert draft is not None, "the start refuses other drafters"
    layer.attn_backend = kind = retrieval_backend if draft.is_retrieval else backend
    groups: HeadGroups | None = engine.head_groups
    assert groups is not None, "a drafter is built after the model"
    refuse_other_pages(layer, groups.first, is_split=heads.splits_layers)
    context = get_current_vllm_config().compilation_config.static_forward_context
    entries: list[Any] = [layer]
    if heads.splits_layers:
        num_ranks = vllm_config.parallel_config.tensor_parallel_size
        rank = get_tensor_model_parallel_rank() if num_ranks > 1 else 0
        # Ranks that hold other heads of the model are told apart where they share
        # one of the drafter's.
        start = heads_held(heads, num_ranks, rank).start
        entries = [
            HeadCache(
                f"{layer.layer_name}_kv{head}_beside{start}",
                layer,
                draft.is_retrieval,
                kind,
                groups,
                is_drafters=True,
            )
            for head in heads_of_rank(rank, num_ranks, draft.num_kv_heads)
        ]
        give_heads(layer, entries)
    else:
        del context[layer.layer_name]
    for entry in entries:
        if groups.drafted:
            num_groups = groups.grouping.num_of_kind(draft.is_retrieval)
            make_room(context, kind, num_groups, groups.drafted)
        assert entry.layer_name not in context, entry.layer_name
        context[entry.layer_name] = entry
        groups.drafted.append(entry.layer_name)


def refuse_other_pages(layer: Attention, first: Attention, *, is_split: bool) -> None:
    """Refuse a drafter whose heads' blocks are not of the size of the model's.

    vLLM would make a group of each of its heads.

    Args:
        first: A layer of the model.
        is_split: Heads have blocks of their own.

    Raises:
        ValueError: Names both and the remedy.
    """
    vllm_config = get_current_vllm_config()
    own, other = (x.get_kv_cache_spec(vllm_config) for x in (layer, first))
    if is_split:
        own, other = head_spec(own), head_spec(other)
    if own != other:
        raise ValueError(
            "speculative_config.model must have KV heads like those of the served "
            f"model {BESIDE}, got {layer.layer_name} with {own}, not {other}; "
            f"{DRAFT_OTHERWISE}"
        )


def refuse_scattered(heads: list[Any]) -> None:
    """Refuse a drafter whose heads vLLM dealt to several groups.

    Args:
        heads: Entries of one group.

    Raises:
        ValueError: Names the layer and the remedy.
    """
    drafters = (layer for head in heads if head.is_drafters for layer in head.owners)
    for layer in dict.fromkeys(drafters):
        if not {head.entry for head in layer.impl.heads} <= set(heads):
            raise ValueError(
                f"speculative_config.model must have its KV heads in one group {BESIDE}"
                f", got {layer.layer_name} in several; {DRAFT_OTHERWISE}"
            )


def make_room(
    context: dict[str, Any], kind: type, num_groups: int, placed: Collection[str]
) -> None:
    """See that the next entry of a kind gets the group of the last one.

    vLLM deals the entries of a kind out to its groups in turn, in the order in which
    they stand: others are taken from further up and stand between::

        groups    0  1  2  0  1  2          0  1  2  0  1  2
        entries   a  b  c  d  X        ->   c  d  X  a  b  Y

    Args:
        context: vLLM's layers by name; its order is changed.
        kind: Backend class of the entries.
        num_groups: Groups of the kind.
        placed: Names that stay where they are.
    """
    others = [
        name
        for name, entry in context.items()
        if getattr(entry, "attn_backend", None) is kind
        and name not in placed
        and not getattr(entry, "kv_sharing_target_layer_name", None)
        and not getattr(entry, "sliding_window", None)
    ]
    for name in others[: num_groups - 1]:
        context[name] = context.pop(name)
