"""What only the loaded model can tell: do its layers obey the policy?

Called by every metadata builder, which are the first of ours to see all layers, the
drafter's included, on both model runners; nothing has been served then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sink.cache.spec import SinkSpec
from vllm_sink.policy.refusals import unreached

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse_layers(vllm_config: VllmConfig) -> None:
    """Refuse a model whose layers don't obey the policy, or not all that should.

    Raises:
        ValueError: Names the layer, what it does and what to change.
    """
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

    layers = _layers(vllm_config)
    specs = layer_specs(vllm_config)
    reached = False
    for name, spec in specs.items():
        backend = layers[name].get_attn_backend()
        if isinstance(spec, ChunkedLocalAttentionSpec):
            raise ValueError(
                "model must not use chunked-local attention with --attention-backend "
                f"sink, got {name}; drop --attention-backend sink"
            )
        if isinstance(spec, FullAttentionSpec) and backend.get_name() != "SINK":
            raise ValueError(
                "every layer with full attention must obey the policy with "
                f"--attention-backend sink, got {backend.get_name()} for {name}; "
                "select sink for the drafter and for each kind of layer, too"
            )
        if isinstance(spec, SinkSpec) and spec.head_size_v != spec.head_size:
            raise ValueError(
                "model must have values of the keys' head size with "
                f"--attention-backend sink, got {spec.head_size_v} and "
                f"{spec.head_size} in {name}; drop --attention-backend sink"
            )
        # A layer of retrieval heads alone has a spec of full attention, and obeys.
        reached |= isinstance(spec, (SinkSpec, FullAttentionSpec))
    if not reached:
        _refuse_unreached(vllm_config, specs)
    _refuse_lost_drafter(vllm_config, specs)


def layer_specs(vllm_config: VllmConfig) -> dict[str, Any]:
    """What each layer, head and drafter's layer asks of the KV cache.

    Layers that read another's cache are among them, with a spec like its owner's.
    """
    specs: dict[str, Any] = {}
    for name, layer in _layers(vllm_config).items():
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is None:
            continue
        if hasattr(spec, "head_size"):
            spec = layer.get_attn_backend().customize_spec(spec)
        specs[name] = spec
    return specs


def _layers(vllm_config: VllmConfig) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers: dict[str, Any] = get_layers_from_vllm_config(
        vllm_config, AttentionLayerBase
    )
    return layers


def _refuse_unreached(vllm_config: VllmConfig, specs: dict[str, Any]) -> None:
    # A stage of a pipeline may hold none of the layers with full attention.
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return
    kinds = sorted({type(spec).__name__ for spec in specs.values()})
    why = f"whose layers are all of another kind ({', '.join(kinds)})"
    raise ValueError(str(unreached(vllm_config.model_config.model, why)))


def _refuse_lost_drafter(vllm_config: VllmConfig, specs: dict[str, Any]) -> None:
    """Runner V1 gives a ``draft_model`` drafter the FIRST group's block table.

    Whichever group its layers are in: with two it would write into the target's
    cache. EAGLE and MTP drafters get the table of their own group, on V2 all do.
    """
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return
    if vllm_config.use_v2_model_runner:
        return
    if not UniformTypeKVCacheSpecs.is_uniform_type(specs):
        kinds = sorted({type(spec).__name__ for spec in specs.values()})
        raise ValueError(
            "speculative_config.method must not be 'draft_model' on model runner V1 "
            "where the layers' caches form several groups, got "
            f"{', '.join(kinds)}; choose ngram or eagle, or set "
            "VLLM_USE_V2_MODEL_RUNNER=1 on a GPU"
        )
