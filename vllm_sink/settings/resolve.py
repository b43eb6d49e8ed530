"""The ``sink`` section with paths replaced by values, read once.

The first caller is the process that configures the engine. The values that it reads
replace the path in ``additional_config``, which vLLM carries to every process.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from vllm_sink.policy.config import SECTION, SinkConfig
from vllm_sink.policy.head_map import FACTS, ModelShape, check_scale, select
from vllm_sink.settings.layer_kinds import layer_owners, own_kv_heads
from vllm_sink.settings.pattern_files import (
    check_model,
    read_scores,
    recommended_fraction,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def resolve(vllm_config: VllmConfig) -> SinkConfig:
    """The settings of ``vllm_config``, whose section gets values for paths.

    Raises:
        ValueError: The section, a file or its shape, by name.
    """
    config = SinkConfig.from_additional_config(vllm_config.additional_config)
    model = vllm_config.model_config
    if not config.has_retrieval or model is None:
        return config
    chosen = resolved(config, model_shape(model))
    section = {
        field.name: getattr(chosen, field.name)
        for field in fields(chosen)
        if getattr(chosen, field.name) != field.default
    }
    if section != vllm_config.additional_config[SECTION]:
        # A new dict: the user's own stays as it is.
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            SECTION: section,
        }
    return chosen


def resolved(config: SinkConfig, shape: ModelShape) -> SinkConfig:
    """The settings with ``retrieval_heads`` of 0 and 1: fraction and layers applied.

    Resolving again changes nothing.

    Raises:
        ValueError: A file or a map that doesn't fit the model, by name.
    """
    if not config.has_retrieval:
        return config
    if not shape.governed:
        raise ValueError(
            "sink.retrieval_heads must be left out for a model without a layer of full "
            f"attention, got {shape.name}, whose config.json has none; leave "
            "sink.retrieval_heads and sink.retrieval_layers out"
        )
    layers = [_owner(layer, shape) for layer in config.retrieval_layers or ()]
    governed = set(shape.governed)
    scores = [
        [0.0] * shape.num_kv_heads if layer in governed else []
        for layer in range(shape.num_layers)
    ]
    fraction = config.retrieval_fraction
    if config.retrieval_heads is not None:
        check_model(config.retrieval_heads, shape)
        scores = read_scores(config.retrieval_heads, shape)
        if fraction is None:
            fraction = recommended_fraction(config.retrieval_heads)
        check_scale(scores, fraction, config.retrieval_heads)
    chosen = select(scores, fraction, layers)
    return replace(
        config,
        retrieval_heads=chosen.values(),
        retrieval_fraction=None,
        retrieval_layers=None,
    )


def _owner(layer: int, shape: ModelShape) -> int:
    """The layer whose heads an entry of ``retrieval_layers`` names."""
    if layer >= shape.num_layers:
        raise ValueError(
            f"sink.retrieval_layers must be below {shape.num_layers}, the layers "
            f"of {shape.name}, got {layer}; the first layer is 0"
        )
    owner = shape.owner(layer)
    if owner is None:
        governed = ", ".join(map(str, shape.readers))
        raise ValueError(
            f"sink.retrieval_layers must be layers with full attention, of which "
            f"{shape.name} has {governed}, got {layer}; the others keep what the model "
            "gives them: leave it out"
        )
    return owner


def model_shape(model_config: Any) -> ModelShape:
    """The attention heads of vLLM's ``ModelConfig``.

    vLLM knows what model families call their heads and layers.
    """
    text = model_config.hf_text_config
    facts = tuple((fact, getattr(text, fact, None)) for fact in FACTS)
    num_layers = model_config.get_total_num_hidden_layers()
    owners = layer_owners(text, num_layers)
    governed = [i for i, owner in enumerate(owners) if owner is not None]
    return ModelShape(
        num_layers=num_layers,
        num_kv_heads=(
            own_kv_heads(text, governed) or model_config.get_total_num_kv_heads()
        ),
        owners=owners,
        num_heads=text.num_attention_heads,
        facts=tuple(fact for fact in facts if fact[1] is not None),
        name=model_config.model,
    )
