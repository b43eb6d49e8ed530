"""Checks of an engine's configuration: settings that the policy can't honour.

Each check is one function that looks at the configuration alone and refuses the first
thing that must change, by :func:`vllm_sink.start.must.must`. :func:`check_settings`
asks them all, where the configuration is made and once more before the first module is
built (vLLM settles some of it in between). :mod:`vllm_sink.start.loaded` checks the
loaded model, :mod:`vllm_sink.start.groups` the groups that vLLM made. ``vllm-sink
check`` starts an engine, which runs all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_sink.engine import BACKEND_NAME, Engine
from vllm_sink.policy.config import SECTION, has_section
from vllm_sink.policy.slots import has_layers_beside
from vllm_sink.rotation.own_rotation import changed_rotation
from vllm_sink.settings.layer_kinds import WITHOUT_CACHE, layer_kinds
from vllm_sink.start.drafters import check_drafter, check_drafter_beside
from vllm_sink.start.host_cache import check_connector
from vllm_sink.start.lookalikes import refuse_lookalikes
from vllm_sink.start.must import must

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FLAG = "--attention-backend sink"
DROP = f"drop {FLAG}"

Check = Callable[[Engine], None]


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether ``--attention-backend sink`` was given (for any group of layers)."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return any(getattr(backend, "name", None) == BACKEND_NAME for backend in chosen)


def refuse_forgotten_backend(vllm_config: VllmConfig) -> None:
    """Refuse a ``sink`` section that stock attention would ignore.

    Raises:
        ValueError: Names the section and the flag.
    """
    additional = vllm_config.additional_config
    if has_section(additional):
        backend = vllm_config.attention_config.backend
        must(
            is_selected(vllm_config),
            "--attention-backend",
            f"be sink where --additional-config has a {SECTION} section",
            f"{getattr(backend, 'name', backend)} and the section "
            f"{additional[SECTION]!r}",
            f"pass {FLAG}, or take the section away",
        )
    else:
        refuse_lookalikes(additional, selected=False)


def check_settings(engine: Engine) -> None:
    """Refuse the first setting that the policy can't honour.

    Raises:
        ValueError: Names the setting, its value and the remedy.
    """
    for check in CHECKS:
        check(engine)


def _platform(engine: Engine) -> None:
    """Refuse vLLM's own CPU platform, which ignores the selected backend."""
    from vllm.platforms import current_platform

    name, value = "platform", type(current_platform).__name__
    remedy = "let vLLM load this package's platform plugin, named sink"
    if "VLLM_TARGET_DEVICE" in os.environ:  # then vLLM asks no platform plugin
        name, value = "VLLM_TARGET_DEVICE", repr(os.environ["VLLM_TARGET_DEVICE"])
        remedy = "unset it: a vLLM that is built for CPUs needs none"
    must(
        not current_platform.is_cpu() or getattr(current_platform, "takes_sink", False),
        name,
        f"leave the choice of the CPU platform to vLLM's plugins with {FLAG}, which "
        "vLLM's own ignores",
        value,
        remedy,
    )


def _lookalikes(engine: Engine) -> None:
    refuse_lookalikes(engine.vllm_config.additional_config, selected=True)


def _context_parallel(engine: Engine) -> None:
    parallel = engine.vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        must(
            getattr(parallel, name) == 1,
            name,
            f"be 1 with {FLAG}",
            getattr(parallel, name),
            "a bounded context needs no context parallelism: use tensor parallelism",
        )


def _kind_of_model(engine: Engine) -> None:
    model = engine.vllm_config.model_config
    if model is None:
        return
    must(
        not model.use_mla,
        "model",
        f"not use MLA with {FLAG}",
        repr(model.model),
        "serve it with vLLM's own MLA backend",
    )
    must(
        not model.is_encoder_decoder,
        "model",
        f"be decoder-only with {FLAG}",
        f"the encoder-decoder {model.model!r}",
        DROP,
    )
    must(
        model.attention_chunk_size is None,
        "model",
        f"not use chunked-local attention with {FLAG}",
        f"{model.model!r} with attention_chunk_size {model.attention_chunk_size}",
        DROP,
    )
    must(
        not model.is_mm_prefix_lm,
        "model",
        f"not look both ways within an image with {FLAG}",
        repr(model.model),
        "pass --language-model-only to serve its text",
    )


def must_reach(ok: bool, model: str, why: str) -> None:
    """Refuse a model in which no layer obeys the policy, unless ``ok``.

    Args:
        why: No layer does, as a clause.
    """
    must(
        ok,
        "model",
        f"have a layer with full attention for {FLAG} and its {SECTION} section to act "
        "on",
        f"{model!r}, {why}",
        f"{DROP} and the section: this cache is bounded without them",
    )


def _reaches_a_layer(engine: Engine) -> None:
    model = engine.vllm_config.model_config
    if model is None:
        return
    must_reach(not model.is_attention_free, model.model, "which has no attention")
    # Set if no layer is without.
    window = engine.vllm_config.cache_config.sliding_window
    why = f"whose layers all keep a window of {window} tokens"
    must_reach(window is None, model.model, why)


def _hybrid_manager(engine: Engine) -> None:
    model = engine.vllm_config.model_config
    scheduler = engine.vllm_config.scheduler_config
    if model is None or not scheduler.disable_hybrid_kv_cache_manager:
        return
    kinds = sorted(set(getattr(model.hf_text_config, "layer_types", None) or []))
    must(
        len(kinds) < 2,
        "disable_hybrid_kv_cache_manager",
        f"be unset with {FLAG} for a model that has several kinds of layers",
        f"True for {model.model!r} with {', '.join(kinds)}",
        "drop --disable-hybrid-kv-cache-manager",
    )


def _own_rotation(engine: Engine) -> None:
    """Refuse overrides that change the rotation below the trained length."""
    model = engine.vllm_config.model_config
    # Once: models change their config as they are built.
    change = engine.once("own rotation", lambda: changed_rotation(model))
    if change is not None:
        must(
            False,
            "--hf-overrides",
            "rotate the positions below the trained length "
            f"{change.trained_length} as the model's files do, with {FLAG}",
            f"{change.overrides}, {change.effect}",
            f"{change.remedy} (another rotation that is meant belongs into the model's "
            "config.json)",
        )


def _interpreter(engine: Engine) -> None:
    """Refuse ``triton_interpreter`` where no kernel would be interpreted."""
    if not engine.config.triton_interpreter:
        return
    import torch
    from vllm.platforms import current_platform

    must(
        current_platform.is_cpu(),
        "sink.triton_interpreter",
        "be false on a GPU",
        json.dumps(True),
        "it is for machines without one: remove it",
    )
    must(
        _is_interpreted(),
        "TRITON_INTERPRET",
        "be 1 before Triton is imported with sink.triton_interpreter",
        f"{os.environ.get('TRITON_INTERPRET')!r} then or now",
        "set it in the environment of the process",
    )
    model: Any = engine.vllm_config.model_config
    must(
        model is None or model.dtype != torch.bfloat16,
        "dtype",
        "be float32 or float16 with sink.triton_interpreter",
        "bfloat16, which Triton's interpreter multiplies wrongly",
        "pass --dtype float32",
    )


def _is_interpreted() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    import triton.language as tl

    # Triton decorates its own library as it is imported.
    return type(tl.cdiv).__name__ == "InterpretedFunction"


def _retrieval_heads(engine: Engine) -> None:
    heads, vllm_config = engine.config.head_map, engine.vllm_config
    if heads is None or not heads.num_retrieval_heads or heads.is_uniform:
        return
    beside = "with sink.retrieval_heads or sink.retrieval_layers"
    must(
        not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
        "disable_hybrid_kv_cache_manager",
        f"be false {beside}",
        "true, which would keep everything for every head",
        "drop --disable-hybrid-kv-cache-manager",
    )
    must(
        not vllm_config.cache_config.kv_sharing_fast_prefill,
        "kv_sharing_fast_prefill",
        f"be false {beside}",
        "true",
        "drop --kv-sharing-fast-prefill",
    )
    check_drafter_beside(engine, beside)


def _stages_beside(engine: Engine) -> None:
    """Refuse pipeline stages that can't tell what the others hold beside heads.

    All stages have the same groups of heads, in pages as large as the largest of any
    layer; a stage knows the pages of the layers that it has.
    """
    heads, vllm_config = engine.config.head_map, engine.vllm_config
    model = vllm_config.model_config
    if model is None or heads is None or heads.num_retrieval_heads == 0:
        return
    if heads.is_uniform or not has_layers_beside(model.is_hybrid, heads):
        return
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    kinds = layer_kinds(model.hf_text_config, heads.num_layers)
    if num_stages == 1 or kinds is None:
        return
    from vllm_sink.cache.workers import stages_of

    wanted = set(kinds) - WITHOUT_CACHE
    for number, stage in enumerate(stages_of(vllm_config, heads.num_layers)):
        lacking = wanted - {kinds[i] for i in stage}
        must(
            not lacking,
            "pipeline_parallel_size",
            "leave every stage layers of each kind with retrieval heads in a model "
            "that has layers of other kinds",
            f"{num_stages}, where stage {number} has no {', '.join(sorted(lacking))}",
            "use fewer stages, or tensor parallelism alone",
        )


# In the order in which the start tells of them.
CHECKS: tuple[Check, ...] = (
    _platform,
    _lookalikes,
    _context_parallel,
    check_connector,
    _kind_of_model,
    _retrieval_heads,
    _stages_beside,
    _reaches_a_layer,
    _hybrid_manager,
    check_drafter,
    _interpreter,
    _own_rotation,
)
