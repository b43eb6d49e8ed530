"""The layers beside those that the policy governs, as vLLM groups them.

Windows of the model's own and states (Mamba, linear attention, convolution) share
vLLM's pool of blocks, whose pages are all as large as the largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec

from vllm_sink.policy.layout import cdiv
from vllm_sink.policy.slots import LayersBeside
from vllm_sink.settings.layer_kinds import layer_kinds

Spec = TypeVar("Spec", bound=AttentionSpec)


@dataclass(frozen=True)
class Beside:
    """All layers beside, and the page that they make.

    Args:
        layers: By kind, in the order of the model.
        page_bytes: Bytes of the largest page.
    """

    layers: tuple[LayersBeside, ...]
    page_bytes: int


def in_page(spec: Spec, page_bytes: int) -> Spec:
    """The spec of a layer whose page becomes as large as the largest.

    As vLLM does it: a whole number of blocks together; else the page is padded.
    """
    ratio, rest = divmod(page_bytes, spec.page_size_bytes)
    if rest:
        return replace(spec, page_size_padded=page_bytes)
    return replace(spec, block_size=spec.block_size * ratio)


def find_layers_beside(
    vllm_config: VllmConfig,
    governed: set[Any],
    governed_page: int,
    stages: Sequence[range],
    stage: int,
) -> Beside:
    """The layers with a KV cache that are not ``governed``, on one worker.

    Args:
        governed_page: Bytes of a governed layer's page.
        stages: The layers of each pipeline stage. stage: The worker's.

    Raises:
        ValueError: What other stages hold can't be told from what this one holds.
    """
    layers: dict[str, Any] = get_layers_from_vllm_config(
        vllm_config, AttentionLayerBase
    )
    found: dict[KVCacheSpec, list[str]] = {}
    for name, layer in layers.items():
        shares = getattr(layer, "kv_sharing_target_layer_name", None) is not None
        if layer in governed or shares:
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = layer.get_attn_backend().customize_spec(spec)
        if spec is not None:
            found.setdefault(spec, []).append(name)
    pages = [spec.page_size_bytes for spec in found]
    page_bytes = max([governed_page, *pages])
    kinds = tuple(
        _kind(
            spec,
            on_stages(vllm_config, names, stages, stage),
            stage,
            page_bytes,
            vllm_config,
        )
        for spec, names in found.items()
    )
    return Beside(kinds, page_bytes)


def on_stages(
    vllm_config: VllmConfig, names: list[str], stages: Sequence[range], stage: int
) -> tuple[int, ...]:
    """How many layers each stage holds of a spec that these have on one stage.

    config.json says of which kind each layer is; layers of a kind have like specs.

    Args:
        names: All layers of the stage that have the spec.
    """
    if len(stages) == 1:
        return (len(names),)
    last = stages[-1].stop
    kinds = layer_kinds(vllm_config.model_config.hf_text_config, last) or [""] * last
    counted = Counter(kinds[extract_layer_index(name)] for name in names)
    of_stages = [0] * len(stages)
    for kind, count in counted.items():
        alike = [sum(kinds[i] == kind for i in layers) for layers in stages]
        each, rest = divmod(count, alike[stage])
        if rest:
            raise ValueError(
                "pipeline_parallel_size must be 1 with retrieval heads in a model "
                f"whose layers of one kind differ, got {count} like {names[0]} among "
                f"{alike[stage]} of kind {kind!r}; use tensor parallelism"
            )
        of_stages = [
            total + each * here for total, here in zip(of_stages, alike, strict=True)
        ]
    return tuple(of_stages)


def _kind(
    spec: KVCacheSpec,
    of_stages: tuple[int, ...],
    stage: int,
    page_bytes: int,
    vllm_config: VllmConfig,
) -> LayersBeside:
    count = of_stages[stage]
    of_stages = of_stages if len(of_stages) > 1 else ()
    window = getattr(spec, "sliding_window", None)
    if window is None:
        needed = spec.max_memory_usage_bytes(vllm_config)
        states = cdiv(needed, spec.page_size_bytes)
        content, checkpoints = spec.page_size_bytes, 0
        if isinstance(spec, MambaSpec):
            content = spec.state_content_size_bytes
            if vllm_config.cache_config.mamba_cache_mode == "align":
                # Counted above; written within a prompt, at its last full block.
                checkpoints = spec.num_prefill_checkpoint_blocks
        states -= checkpoints
        return LayersBeside(
            count,
            0,
            None,
            states,
            checkpoints,
            kept_bytes=states * content,
            of_stages=of_stages,
        )
    assert isinstance(spec, AttentionSpec), spec
    return LayersBeside(
        count,
        in_page(spec, page_bytes).block_size,
        window,
        kept_bytes=spec.unpadded_page_size_bytes // spec.block_size,
        of_stages=of_stages,
    )
