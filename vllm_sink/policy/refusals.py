"""What an engine's settings ask for that the policy can't honour.

Each check is one function below: it looks at vLLM's configuration and yields what
must change, as a :class:`Refusal`. They need the configuration alone, no engine:
the start raises the first (:func:`validate_engine`), a check before the start
lists them all (:func:`find_refusals`). What only a loaded model can tell is
refused where it is seen: :mod:`vllm_sink.attention.loaded`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vllm_sink.policy.config import SECTION, SinkConfig, has_section
from vllm_sink.policy.drafters import refuse_drafter
from vllm_sink.policy.lookalikes import refuse_lookalikes
from vllm_sink.policy.own_rotation import changed_rotation
from vllm_sink.policy.refusal import Refusal
from vllm_sink.policy.resolve import resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DROP = "drop --attention-backend sink"


Check = Callable[["VllmConfig", SinkConfig], Iterator[Refusal]]


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether ``--attention-backend sink`` was given (for any group of layers)."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return any(getattr(backend, "name", None) == "SINK" for backend in chosen)


def find_refusals(vllm_config: VllmConfig) -> list[Refusal]:
    """All that must change before an engine of this configuration can start.

    Raises:
        ValueError: The ``sink`` section itself can't be read.
    """
    if not is_selected(vllm_config):
        return list(_forgotten_backend(vllm_config))
    config = _settings(vllm_config)
    return [refusal for check in CHECKS for refusal in check(vllm_config, config)]


def refuse_forgotten_backend(vllm_config: VllmConfig) -> None:
    """Refuse a ``sink`` section that stock attention would ignore.

    Raises:
        ValueError: Names the section and the flag.
    """
    for refusal in _forgotten_backend(vllm_config):
        raise ValueError(str(refusal))


def validate_engine(vllm_config: VllmConfig) -> SinkConfig:
    """The policy's settings, if the engine can honour them.

    Pattern files are read by the first call: see :mod:`vllm_sink.policy.resolve`.
    S and W come back clipped to the longest request: it is the same policy, and
    one that the kernels can count.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """
    config = _settings(vllm_config)
    for check in CHECKS:
        for refusal in check(vllm_config, config):
            raise ValueError(str(refusal))
    return config


def _settings(vllm_config: VllmConfig) -> SinkConfig:
    config, model = resolve(vllm_config), _target(vllm_config)
    return config if model is None else config.clipped(model.max_model_len)


def _target(vllm_config: VllmConfig) -> Any:
    """The served model's config, also while its drafter is being built."""
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.target_model_config is not None:
        return speculative.target_model_config
    return vllm_config.model_config


def _forgotten_backend(vllm_config: VllmConfig) -> Iterator[Refusal]:
    additional = vllm_config.additional_config
    if has_section(additional) and not is_selected(vllm_config):
        backend = vllm_config.attention_config.backend
        yield Refusal(
            "--attention-backend",
            f"must be sink where --additional-config has a {SECTION} section",
            f"{getattr(backend, 'name', backend)} and the section "
            f"{additional[SECTION]!r}",
            "pass --attention-backend sink, or take the section away",
        )
    elif not is_selected(vllm_config):
        yield from refuse_lookalikes(additional, selected=False)


def _lookalikes(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    yield from refuse_lookalikes(vllm_config.additional_config, selected=True)


def _platform(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    """vLLM's own CPU platform, which ignores the selected backend."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or getattr(current_platform, "takes_sink", False):
        return
    name, value = "platform", type(current_platform).__name__
    remedy = "let vLLM load this package's platform plugin, named sink"
    if "VLLM_TARGET_DEVICE" in os.environ:  # then vLLM asks no platform plugin
        name, value = "VLLM_TARGET_DEVICE", repr(os.environ["VLLM_TARGET_DEVICE"])
        remedy = "unset it: a vLLM that is built for CPUs needs none"
    yield Refusal(
        name,
        "must leave the choice of the CPU platform to vLLM's plugins with "
        "--attention-backend sink, which vLLM's own ignores",
        value,
        remedy,
    )


def _context_parallel(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield Refusal(
                name,
                "must be 1 with --attention-backend sink",
                str(getattr(parallel, name)),
                "a bounded context needs no context parallelism: use tensor "
                "parallelism",
            )


def _kv_connector(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        yield Refusal(
            "kv_connector",
            "must be unset with --attention-backend sink",
            repr(transfer.kv_connector),
            "connectors assume append-only blocks: drop --kv-transfer-config",
        )


def _kind_of_model(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    model = vllm_config.model_config
    if model is None:
        return
    if model.use_mla:
        yield Refusal(
            "model",
            "must not use MLA with --attention-backend sink",
            repr(model.model),
            "serve it with vLLM's own MLA backend",
        )
    if model.is_encoder_decoder:
        yield Refusal(
            "model",
            "must be decoder-only with --attention-backend sink",
            f"the encoder-decoder {model.model!r}",
            _DROP,
        )
    if model.attention_chunk_size is not None:
        yield Refusal(
            "model",
            "must not use chunked-local attention with --attention-backend sink",
            f"{model.model!r} with attention_chunk_size {model.attention_chunk_size}",
            _DROP,
        )
    if model.is_mm_prefix_lm:
        yield Refusal(
            "model",
            "must not look both ways within an image with --attention-backend sink",
            repr(model.model),
            "pass --language-model-only to serve its text",
        )


def unreached(model: str, why: str) -> Refusal:
    """No layer of ``model`` obeys the policy."""
    return Refusal(
        "model",
        "must have a layer with full attention for --attention-backend sink and its "
        f"{SECTION} section to act on",
        f"{model!r}, {why}",
        f"{_DROP} and the section: this cache is bounded without them",
    )


def _reaches_no_layer(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    model = vllm_config.model_config
    if model is None:
        return
    if model.is_attention_free:
        yield unreached(model.model, "which has no attention")
    window = vllm_config.cache_config.sliding_window  # set if no layer is without
    if window is not None:
        yield unreached(
            model.model, f"whose layers all keep a window of {window} tokens"
        )


def _one_kv_cache_group(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    model = vllm_config.model_config
    if (
        model is None
        or not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    ):
        return
    kinds = sorted(set(getattr(model.hf_text_config, "layer_types", None) or []))
    if len(kinds) > 1:
        yield Refusal(
            "disable_hybrid_kv_cache_manager",
            "must be unset with --attention-backend sink for a model that has several "
            "kinds of layers",
            f"True for {model.model!r} with {', '.join(kinds)}",
            "drop --disable-hybrid-kv-cache-manager",
        )


def _interpreter(vllm_config: VllmConfig, config: SinkConfig) -> Iterator[Refusal]:
    """``triton_interpreter`` where the kernels would not be interpreted."""
    if not config.triton_interpreter:
        return
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield Refusal(
            "sink.triton_interpreter",
            "must be false on a GPU",
            "true",
            "it is for machines without one: remove it",
        )
        return
    if not _is_interpreted():
        yield Refusal(
            "TRITON_INTERPRET",
            "must be 1 before Triton is imported with sink.triton_interpreter",
            f"{os.environ.get('TRITON_INTERPRET')!r} then or now",
            "set it in the environment of the process",
        )
    model: Any = vllm_config.model_config
    if model is not None and model.dtype == torch.bfloat16:
        yield Refusal(
            "dtype",
            "must be float32 or float16 with sink.triton_interpreter",
            "bfloat16, which Triton's interpreter multiplies wrongly",
            "pass --dtype float32",
        )


def _is_interpreted() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    import triton.language as tl

    # Triton decorates its own library as it is imported.
    return type(tl.cdiv).__name__ == "InterpretedFunction"


def _retrieval_heads(vllm_config: VllmConfig, config: SinkConfig) -> Iterator[Refusal]:
    heads = config.head_map
    if heads is None or not heads.num_retrieval_heads or heads.is_uniform:
        return
    name = "must {} with sink.retrieval_heads or sink.retrieval_layers"
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield Refusal(
            "disable_hybrid_kv_cache_manager",
            name.format("be false"),
            "true, which would keep everything for every head",
            "drop --disable-hybrid-kv-cache-manager",
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield Refusal(
            "kv_sharing_fast_prefill",
            name.format("be false"),
            "true",
            "drop --kv-sharing-fast-prefill",
        )
    if parallel.pipeline_parallel_size > 1:
        yield Refusal(
            "pipeline_parallel_size",
            name.format("be 1"),
            str(parallel.pipeline_parallel_size),
            "use tensor parallelism",
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in MODEL_FREE_DRAFTERS:
        yield Refusal(
            "speculative_config.method",
            name.format(f"be one of {', '.join(MODEL_FREE_DRAFTERS)}"),
            f"{speculative.method!r}, whose layers are not in the map",
            "draft with n-grams or drop --speculative-config",
        )
    if model is not None and _own_windows(model):
        yield Refusal(
            "model",
            name.format("have no windows of its own"),
            repr(model.model),
            "leave sink.retrieval_heads and sink.retrieval_layers out",
        )


# Drafters that have no layers.
MODEL_FREE_DRAFTERS = ("ngram", "ngram_gpu", "suffix")


def _own_windows(model: Any) -> bool:
    """Whether some layers of the model have something else than full attention."""
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    return model.get_sliding_window() is not None or bool(
        set(kinds) - {"full_attention"}
    )


# In the order in which the start tells of them.
CHECKS: tuple[Check, ...] = (
    _platform,
    _lookalikes,
    _context_parallel,
    _kv_connector,
    _kind_of_model,
    _retrieval_heads,
    _reaches_no_layer,
    _one_kv_cache_group,
    refuse_drafter,
    _interpreter,
    changed_rotation,
)
