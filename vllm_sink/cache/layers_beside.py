"""The layers beside those that the policy governs, as vLLM groups them.

Windows of the model's own and states (Mamba, linear attention, convolution) share
vLLM's pool of blocks, whose pages are all as large as the largest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec

from vllm_sink.policy.layout import cdiv
from vllm_sink.policy.slots import LayersBeside

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
    vllm_config: VllmConfig, governed: set[Any], governed_page: int
) -> Beside:
    """The layers with a KV cache that are not ``governed``.

    Args:
        governed_page: Bytes of a governed layer's page.
    """
    layers: dict[str, Any] = get_layers_from_vllm_config(
        vllm_config, AttentionLayerBase
    )
    counted: Counter[KVCacheSpec] = Counter()
    for layer in layers.values():
        shares = getattr(layer, "kv_sharing_target_layer_name", None) is not None
        if layer in governed or shares:
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = layer.get_attn_backend().customize_spec(spec)
        if spec is not None:
            counted[spec] += 1
    pages = [spec.page_size_bytes for spec in counted]
    page_bytes = max([governed_page, *pages])
    kinds = tuple(
        _kind(spec, count, page_bytes, vllm_config) for spec, count in counted.items()
    )
    return Beside(kinds, page_bytes)


def _kind(
    spec: KVCacheSpec, count: int, page_bytes: int, vllm_config: VllmConfig
) -> LayersBeside:
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
            count, 0, None, states, checkpoints, kept_bytes=states * content
        )
    assert isinstance(spec, AttentionSpec), spec
    return LayersBeside(
        count,
        in_page(spec, page_bytes).block_size,
        window,
        kept_bytes=spec.unpadded_page_size_bytes // spec.block_size,
    )
