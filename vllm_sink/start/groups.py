"""A check of the KV cache groups that vLLM built: each obeys the policy.

Once an engine core has its block managers and before it serves, each worker says
which group each of its layers and heads is in, and each group's manager is looked at,
on every platform and whatever grouped the layers (vLLM's planning, a model's own, a
platform's). A governed layer under any manager but ours, or ours under another
policy, would be evicted as that manager evicts: the start ends instead.

:func:`check_groups` is called by :func:`vllm_sink.plugin.compat.watch_engine_core`.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.cache.counted import RetrievalManager
from vllm_sink.cache.free_order import FreeOrder
from vllm_sink.cache.spec import RetrievalSpec, SinkSpec
from vllm_sink.start.checks import DROP, FLAG, is_selected, must_reach
from vllm_sink.start.loaded import layer_specs
from vllm_sink.start.log_lines import log_policy
from vllm_sink.start.must import must

# A layer or head of one worker: name, its spec, the index of its KV cache group.
Placed = tuple[str, Any, int | None]


def check_groups(engine_core: Any) -> None:
    """Refuse an engine whose groups don't obey the policy; else log the policy.

    What obeys it is told what only all groups together show.

    Raises:
        ValueError: Names the layer and its manager, or the model whose groups are
            all vLLM's own.
    """
    if not is_selected(engine_core.vllm_config):
        return
    scheduler = engine_core.scheduler
    kv_cache_manager = getattr(scheduler, "kv_cache_manager", None)
    must(
        kv_cache_manager is not None,
        "scheduler_cls",
        f"have vLLM's kv_cache_manager with {FLAG}",
        type(scheduler).__name__,
        "drop --scheduler-cls",
    )
    assert kv_cache_manager is not None
    coordinator = kv_cache_manager.coordinator
    managers = coordinator.single_type_managers
    for placed in engine_core.model_executor.collective_rpc(placed_layers):
        for name, spec, index in placed:
            refuse_misplaced(name, spec, None if index is None else managers[index])
    kinds = sorted({type(manager).__name__ for manager in managers})
    must_reach(
        any(_is_ours(manager) for manager in managers),
        engine_core.vllm_config.model_config.model,
        f"whose KV cache groups are all vLLM's own ({', '.join(kinds) or 'none'})",
    )
    settle_order(coordinator)
    log_policy(engine_core.vllm_config, managers)


def settle_order(coordinator: Any) -> None:
    """What only the whole of the groups tells of their managers' work; idempotent.

    **In which order vLLM looks a prompt up.** vLLM (0.32 and 0.33) asks each group for
    no more than the one before it has found, and where the first has more than the
    last it learns a prefix that prompts share (``shared_prefix_boundary``). It puts
    full attention first. Layers under the policy, of another class, would stay behind
    a window or a state that comes first in the model (Gemma 3, Mamba): those know ends
    of prompts alone, so nothing would ever be learned. The hit itself is the same in
    any order.

    **Whether long histories count** in the order of free blocks: see
    :attr:`vllm_sink.cache.free_order.FreeOrder.weighs_tails`.

    Args:
        coordinator: vLLM's, of the block managers.
    """
    # A coordinator of one group has no such list. In place: our KV connector looks
    # up with the same list.
    getattr(coordinator, "attention_groups", []).sort(
        key=lambda group: (
            not isinstance(group.spec, FullAttentionSpec),
            not isinstance(group.spec, SinkSpec),
        )
    )
    order = FreeOrder.of(coordinator.block_pool)
    order.weighs_tails = len(coordinator.single_type_managers) == 1


def placed_layers(worker: Any) -> list[Placed]:
    """Each layer and head of a worker, and its group; runs in the worker's process."""
    runner = worker.model_runner
    groups = runner.kv_cache_config.kv_cache_groups
    index = {name: i for i, group in enumerate(groups) for name in group.layer_names}
    layers: dict[str, Any] = get_layers_from_vllm_config(
        runner.vllm_config, AttentionLayerBase
    )

    def group_of(name: str) -> int | None:
        target = getattr(layers.get(name), "kv_sharing_target_layer_name", None)
        return group_of(target) if target else index.get(name)

    return [
        (name, spec, group_of(name))
        for name, spec in layer_specs(runner.vllm_config).items()
    ]


def refuse_misplaced(name: str, spec: Any, manager: Any) -> None:
    """Refuse a layer that its manager would not treat as the policy says.

    Args:
        manager: The block manager of its group; None: it is in no group.

    Raises:
        ValueError: Names both.
    """
    if isinstance(spec, SinkSpec):
        wanted = f"SinkManager of {_policy(spec)}"
        fits = isinstance(manager, SinkManager)
        fits = fits and _policy(manager.kv_cache_spec) == _policy(spec)
    elif isinstance(spec, FullAttentionSpec):  # nothing else keeps everything here
        wanted = "RetrievalManager"
        fits = isinstance(spec, RetrievalSpec) and isinstance(manager, RetrievalManager)
    else:
        wanted = "vLLM's own manager"
        fits = not _is_ours(manager)
    found = "none" if manager is None else type(manager).__name__
    if isinstance(manager, SinkManager):
        found += f" of {_policy(manager.kv_cache_spec)}"
    must(
        fits,
        name,
        f"be managed by {wanted} with {FLAG}",
        found,
        f"choose a sink.window_size that is no window of the model's own, or {DROP}",
    )


def _policy(spec: SinkSpec) -> str:
    return f"{spec.num_sink_tokens} + {spec.sliding_window} tokens"


def _is_ours(manager: Any) -> bool:
    return isinstance(manager, (SinkManager, RetrievalManager))
