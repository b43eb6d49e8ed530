"""A model's configuration as the shape of its KV cache.

Where vLLM is installed its own reading is asked: how many KV heads of which size a
layer has (:mod:`vllm.transformers_utils.model_arch_config_convertor`), which models
generate text, what the checkpoint orders for the cache. Elsewhere the usual names of a
Hugging Face configuration are read. What is not counted here is refused by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

from vllm_sink.policy.head_map import FACTS, ModelShape
from vllm_sink.settings.layer_kinds import layer_owners
from vllm_sink.tools.cache_shape import CacheShape, LayerKind
from vllm_sink.tools.reading import reading
from vllm_sink.tools.states import (
    BESIDE,
    NUM_STATES,
    WITH_KEYS,
    WITH_STATES,
    States,
    names_of,
    states_of,
)

BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
FULL, SLIDING = "full_attention", "sliding_attention"
MOST_LAYERS = 9999
OWN_FIGURE = "read vLLM's own figure in its start-up log"
# Names of the number of KV heads, as vLLM 0.32 reads them.
KV_HEADS = (
    "n_head_kv",
    "num_kv_heads",
    "num_key_value_heads",
    "multi_query_group_num",
    "num_attention_groups",
)
SPACES = "state-space layers"
# vLLM's windows of these models see one token more than config.json says.
ONE_MORE = ("cohere2", "cohere2_moe")
# Configurations of what is no plain attention layer.
NOT_COUNTED = (
    ("kv_lora_rank", "MLA"),
    ("cross_attention_layers", "cross attention"),
    ("block_configs", "blocks that differ between layers"),
    ("layers_block_type", SPACES),
    ("hybrid_override_pattern", SPACES),
    ("attention_chunk_size", "chunked attention"),
    ("hybrid_layer_pattern", "windows of a width of their own"),
)


def read_config(name: str) -> Any:
    """Transformers' configuration of a folder, a ``config.json`` or a Hub name.

    Raises:
        ValueError: It can't be read, by name.
    """
    with reading(name), contextlib.redirect_stdout(sys.stderr):
        from transformers import AutoConfig, PretrainedConfig

        given, _ = PretrainedConfig.get_config_dict(name)
        changes = _spelled_out(given)
        if changes:
            return AutoConfig.for_model(**{**given, **changes})
        if not _has_vllm():
            return AutoConfig.from_pretrained(name)
        from vllm.transformers_utils.config import get_config

        folder = os.path.dirname(name) or "." if os.path.isfile(name) else name
        return get_config(folder, False)


def _spelled_out(given: dict[str, Any]) -> dict[str, Any]:
    """``layer_types`` of a ``sliding_window_pattern`` such as "LLLG" (EXAONE 4).

    Local and global layers in turn.
    """
    pattern = given.get("sliding_window_pattern")
    if not isinstance(pattern, str) or not pattern or given.get("layer_types"):
        return {}
    kinds = [
        SLIDING if pattern[i % len(pattern)] == "L" else FULL
        for i in range(given["num_hidden_layers"])
    ]
    return {"layer_types": kinds}


def _has_vllm() -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return True


def read_shape(
    config: Any,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    cache_dtype: str = "auto",
    *,
    caches_prefixes: bool = True,
) -> CacheShape:
    """The cache shape of a Hugging Face ``config``.

    Args:
        dtype: The model's; ``auto`` as vLLM chooses: the checkpoint's, but bfloat16
            for one in float32.
        cache_dtype: ``auto`` is what the checkpoint orders, else the model's.
        caches_prefixes: With vLLM's prefix caching.

    Raises:
        ValueError: A kind of attention that isn't counted here, by name.
    """
    text = config.get_text_config(decoder=True)
    _refuse_kind(config, text)
    layer_types, window = _layers(text)
    heads = _heads(config, text, len(layer_types))
    # Layers that reuse the cache of an earlier layer write none of their own.
    if shared := _get(text, "num_kv_shared_layers"):
        _check_count("num_kv_shared_layers", shared, below=len(layer_types))
        layer_types = layer_types[: len(layer_types) - shared]
    bytes_per_value = _bytes_per_value(config, text, dtype, "auto")
    counted = Counter(
        (window if kind == SLIDING else 0, *of_layer)
        for kind, of_layer in zip(layer_types, heads, strict=False)
        if kind in WITH_KEYS
    )
    kinds = [
        # Fewer KV heads than GPUs: vLLM replicates them.
        LayerKind(count, own, max(1, num_heads // tensor_parallel_size), size)
        for (own, num_heads, size), count in sorted(counted.items())
    ]
    if count := sum(kind in WITH_STATES for kind in layer_types):
        states = _states(text)
        kinds.append(
            LayerKind(
                count,
                window=0,
                num_kv_heads=0,
                head_size=0,
                state_bytes=states.num_bytes(
                    tensor_parallel_size,
                    bytes_per_value,
                    _recurrent_bytes(text, bytes_per_value),
                ),
                num_states=NUM_STATES[caches_prefixes],
                num_checkpoints=int(caches_prefixes and states.writes_within),
            )
        )
    if not kinds:
        raise ValueError(
            "num_hidden_layers must be at least 1, got no attention layer; mend the "
            "model's config.json"
        )
    return CacheShape(tuple(kinds), _bytes_per_value(config, text, dtype, cache_dtype))


def model_shape(config: Any, name: str = "the model") -> ModelShape:
    """The attention heads that a head map must fit."""
    text = config.get_text_config(decoder=True)
    layer_types, _ = _layers(text)
    owners = layer_owners(text, len(layer_types))
    heads = _heads(config, text, len(layer_types))
    num_kv_heads = {
        count
        for i, (count, _) in enumerate(heads)
        if not owners or owners[i] is not None
    }
    if len(num_kv_heads) > 1:
        raise ValueError(
            "retrieval_heads must be left out for a model whose layers have different "
            f"numbers of KV heads, got {sorted(num_kv_heads)} in {name}; leave "
            "--retrieval-heads out"
        )
    facts = ((fact, _get(text, fact)) for fact in FACTS)
    return ModelShape(
        num_layers=len(layer_types),
        num_kv_heads=num_kv_heads.pop(),
        num_heads=text.num_attention_heads,
        owners=owners,
        facts=tuple(fact for fact in facts if fact[1] is not None),
        name=name,
    )


def _states(text: Any) -> States:
    """The states of a layer, whose sizes are numbers."""
    for name in names_of(text):
        _check_count(name, _get(text, name))
    return states_of(text)


def _recurrent_bytes(text: Any, bytes_per_value: int) -> int:
    """Bytes of a recurrent state's value; as the others' unless the model says so."""
    given = _get(text, "mamba_ssm_dtype") or _get(text, "mamba_ssm_cache_dtype")
    return BYTES_PER_VALUE.get(str(given).removeprefix("torch."), bytes_per_value)


def _get(text: Any, name: str) -> Any:
    """A setting, or None; also None where layers differ, which transformers refuses."""
    try:
        return getattr(text, name, None)
    except Exception:
        return None


def _refuse_kind(config: Any, text: Any) -> None:
    """Refuse a model that is no decoder of plain attention layers."""
    kind = _get(config, "model_type")
    if _get(config, "is_encoder_decoder") or _get(text, "is_encoder_decoder"):
        raise ValueError(
            f"model must be decoder-only, got the encoder-decoder {kind!r}; "
            f"{OWN_FIGURE}"
        )
    if kind is not None and not _generates(config):
        raise ValueError(
            f"model must generate text, got {kind!r}, which encodes it and keeps no KV "
            "cache; name a decoder"
        )
    for name, what in NOT_COUNTED:
        if what == SPACES and names_of(text):
            continue
        if value := _get(text, name):
            raise ValueError(
                f"model must have plain attention layers, got {what} ({name}="
                f"{value!r}); {OWN_FIGURE}"
            )


def _generates(config: Any) -> bool:
    """Whether a model generates text."""
    names = set(_get(config, "architectures") or ())
    if names and _has_vllm():
        from vllm.model_executor.models import registry

        if names & {*registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS}:
            return True
        # vLLM serves others through Transformers, GPT-NeoX for one.
        if any(name.endswith("ForCausalLM") for name in names):
            return True
    elif any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    if _get(config, "is_decoder") is False:
        return False
    from transformers.models.auto import modeling_auto

    known = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return any(config.model_type in table for table in known)


def _layers(text: Any) -> tuple[list[str], int]:
    """The kind of every layer, and the window of those that have one."""
    # A number that is no model's would be a list of that length.
    _check_count("num_hidden_layers", _get(text, "num_hidden_layers"), MOST_LAYERS + 1)
    window = _get(text, "sliding_window") or None
    if window is not None:
        _check_count("sliding_window", window)
        window += _get(text, "model_type") in ONE_MORE
    if _get(text, "use_sliding_window") is False:
        window = None
    kinds = _get(text, "layer_types")
    if not kinds:
        kinds = [SLIDING if window else FULL] * text.num_hidden_layers
    if not isinstance(kinds, (list, tuple)) or any(
        kind not in (FULL, SLIDING, *(BESIDE if names_of(text) else ()))
        for kind in kinds
    ):
        raise ValueError(
            f"layer_types must be a list of {FULL} and {SLIDING}, got {kinds!r}; "
            f"{OWN_FIGURE}"
        )
    if SLIDING in kinds and not window:
        raise ValueError(
            f"sliding_window must be a number of tokens, got {window!r} in a model "
            f"with {kinds.count(SLIDING)} {SLIDING} layers; give it in config.json"
        )
    return list(kinds), window or 0


def _heads(config: Any, text: Any, num_layers: int) -> list[tuple[int, int]]:
    """(KV heads, head size) of every layer."""
    found = _heads_of_vllm(config, text, num_layers)
    if found is None:
        found = [_own_reading(text, layer) for layer in range(num_layers)]
    for num_heads, size in found:
        _check_count("num_key_value_heads", num_heads)
        _check_count("head_dim", size)
    return found


def _heads_of_vllm(
    config: Any, text: Any, num_layers: int
) -> list[tuple[int, int]] | None:
    """Heads as vLLM reads them; None without vLLM, or for a list it can't read."""
    listed = any(isinstance(_get(text, name), (list, tuple)) for name in KV_HEADS)
    if listed or _get(config, "model_type") is None or not _has_vllm():
        return None
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    convertor = convertors.MODEL_ARCH_CONFIG_CONVERTORS.get(
        config.model_type, convertors.ModelArchConfigConvertorBase
    )(config, text)
    layers = convertor.get_per_layer_hf_configs() or [(config, text)] * num_layers
    found = []
    for of_layer in layers:
        read = type(convertor)(*of_layer)
        found.append((read.get_total_num_kv_heads(), read.get_head_size()))
    return found


def _own_reading(text: Any, layer: int) -> tuple[int, int]:
    """(KV heads, head size) of one layer, by their usual names."""
    heads = _get(text, "num_attention_heads")
    _check_count("num_attention_heads", heads)
    named = (value for name in KV_HEADS if (value := _get(text, name)))
    kv_heads = next(named, heads)
    if _get(text, "multi_query") and not _get(text, "new_decoder_architecture"):
        kv_heads = 1
    if isinstance(kv_heads, (list, tuple)):
        _check_count("the length of num_key_value_heads", len(kv_heads))
        if layer >= len(kv_heads):
            raise ValueError(
                f"num_key_value_heads must be a number or one for each layer, got "
                f"{kv_heads!r}; mend the model's config.json"
            )
        kv_heads = kv_heads[layer]
    hidden = _get(text, "hidden_size") or 0
    if hidden:
        _check_count("hidden_size", hidden)
    return kv_heads, _get(text, "head_dim") or hidden // heads


def _bytes_per_value(config: Any, text: Any, dtype: str, cache_dtype: str) -> int:
    if cache_dtype == "auto":
        cache_dtype = _ordered_cache_dtype(config) or "auto"
    if cache_dtype != "auto":
        dtype = cache_dtype.split("_")[0]
    elif dtype == "auto":
        given = _get(config, "dtype") or _get(text, "dtype") or "bfloat16"
        dtype = str(given).removeprefix("torch.")
        dtype = "bfloat16" if dtype == "float32" else dtype
    if dtype not in BYTES_PER_VALUE:
        raise ValueError(
            f"dtype must be one of {', '.join(BYTES_PER_VALUE)}, got {dtype!r}; "
            "pass --dtype or --kv-cache-dtype"
        )
    return BYTES_PER_VALUE[dtype]


def _ordered_cache_dtype(config: Any) -> str | None:
    """The cache dtype that the checkpoint's quantization orders."""
    given = _get(config, "quantization_config") or _get(config, "compression_config")
    if given is None:
        return None
    given = given if isinstance(given, dict) else given.to_dict()
    if _has_vllm():
        from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

        stub: Any = SimpleNamespace(
            hf_config=SimpleNamespace(quantization_config=given)
        )
        found = resolve_kv_cache_dtype_string("auto", stub)
        if found != "auto":
            return found
    # vLLM's attention layers read this of compressed-tensors' checkpoints.
    return "fp8" if given.get("kv_cache_scheme") else None


def _check_count(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < below:
        limit = "" if math.isinf(below) else f" and < {below}"
        raise ValueError(
            f"{name} must be an integer > 0{limit}, got {value!r}; mend the model's "
            "config.json"
        )
