"""A check of the loaded model: its layers obey the policy.

Made when the first metadata builder is made, which is the first of ours to see all
layers, the drafter's included, on both model runners; nothing has been served then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sink.cache.spec import SinkSpec
from vllm_sink.engine import BACKEND_NAME
from vllm_sink.start.checks import DROP, FLAG, must_reach
from vllm_sink.start.must import must

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_sink.engine import Engine


def refuse_layers(engine: Engine, _: AttentionSpec) -> None:
    """Refuse a model with a layer that should obey the policy and doesn't.

    Raises:
        ValueError: Names the layer, what it does and what to change.
    """
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

    vllm_config = engine.vllm_config
    layers = _layers(vllm_config)
    specs = layer_specs(vllm_config)
    reached = False
    for name, spec in specs.items():
        backend = layers[name].get_attn_backend()
        must(
            not isinstance(spec, ChunkedLocalAttentionSpec),
            "model",
            f"not use chunked-local attention with {FLAG}",
            name,
            DROP,
        )
        must(
            not isinstance(spec, FullAttentionSpec)
            or backend.get_name() == BACKEND_NAME,
            "every layer with full attention",
            f"obey the policy with {FLAG}",
            f"{backend and backend.get_name()} for {name}",
            "select sink for the drafter and for each kind of layer, too",
        )
        if isinstance(spec, SinkSpec):
            must(
                spec.head_size_v == spec.head_size,
                "model",
                f"have values of the keys' head size with {FLAG}",
                f"{spec.head_size_v} and {spec.head_size} in {name}",
                DROP,
            )
        # A layer of retrieval heads alone has a spec of full attention, and obeys.
        reached |= isinstance(spec, (SinkSpec, FullAttentionSpec))
    # A stage of a pipeline may hold none of the layers with full attention.
    kinds = sorted({type(spec).__name__ for spec in specs.values()})
    must_reach(
        reached or vllm_config.parallel_config.pipeline_parallel_size > 1,
        vllm_config.model_config.model,
        f"whose layers are all of another kind ({', '.join(kinds)})",
    )
    _refuse_lost_drafter(vllm_config, specs)


def layer_specs(vllm_config: VllmConfig) -> dict[str, Any]:
    """The KV cache spec of each layer and head, a drafter's layers included.

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


def _refuse_lost_drafter(vllm_config: VllmConfig, specs: dict[str, Any]) -> None:
    """Refuse a ``draft_model`` drafter that would write into the target's cache.

    Runner V1 gives it the FIRST group's block table, whichever group its layers are
    in. EAGLE and MTP drafters get the table of their own group, on V2 all do.
    """
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return
    if vllm_config.use_v2_model_runner:
        return
    must(
        UniformTypeKVCacheSpecs.is_uniform_type(specs),
        "speculative_config.method",
        "not be 'draft_model' on model runner V1 where the layers' caches form several "
        "groups",
        ", ".join(sorted({type(spec).__name__ for spec in specs.values()})),
        "choose ngram or eagle, or set VLLM_USE_V2_MODEL_RUNNER=1 on a GPU",
    )
