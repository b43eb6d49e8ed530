"""What vLLM's configuration says of an engine's workers, stages and drafter."""

from __future__ import annotations

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.utils import get_pp_indices

from vllm_sink.policy.draft_heads import KEEPS_EVERYTHING, DraftHeads
from vllm_sink.policy.grouping import Workers, heads_of_workers
from vllm_sink.policy.head_map import HeadMap


def workers_of(vllm_config: VllmConfig, heads: HeadMap) -> Workers:
    """What each worker of an engine holds."""
    return heads_of_workers(
        heads,
        vllm_config.parallel_config.tensor_parallel_size,
        stages_of(vllm_config, heads.num_layers),
        draft_heads(vllm_config),
    )


def stages_of(vllm_config: VllmConfig, num_layers: int) -> list[range]:
    """The layers of each pipeline stage."""
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    return [
        range(*get_pp_indices(num_layers, stage, num_stages))
        for stage in range(num_stages)
    ]


def draft_heads(vllm_config: VllmConfig) -> DraftHeads | None:
    """The heads of the engine's drafter, as its configuration counts them, if any."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in KEEPS_EVERYTHING:
        return None
    model = speculative.draft_model_config
    return DraftHeads(
        max(model.get_total_num_hidden_layers(), 1),
        model.get_total_num_kv_heads(),
        KEEPS_EVERYTHING[speculative.method],
    )


def is_building_drafter(vllm_config: VllmConfig) -> bool:
    """Whether a layer that is being built is a drafter's.

    A drafter is built under a copy of the engine's attention config, on both model
    runners: :func:`vllm_sink.start.drafters.place_drafter` gives it a backend.

    Args:
        vllm_config: The engine's.
    """
    if vllm_config.speculative_config is None:
        return False
    current = get_current_vllm_config().attention_config
    return current is not vllm_config.attention_config
