"""Speculative drafters: refused, or brought under the policy.

A drafter with a KV cache of its own is under the policy like the model it drafts
for: stock attention would keep all of its cache, in a group of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sink.engine import BACKEND_NAME, Engine
from vllm_sink.policy.draft_heads import KEEPS_EVERYTHING
from vllm_sink.policy.slots import has_layers_beside
from vllm_sink.rotation.table_length import lengthen
from vllm_sink.start.must import must

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

DRAFT_OTHERWISE = "draft with n-grams or drop --speculative-config"
# Drafters whose layers vLLM builds from its attention layers: under the policy.
POLICED_DRAFTERS = frozenset({"draft_model", "eagle", "eagle3", "mtp"})
# Drafters that have no layers.
MODEL_FREE_DRAFTERS = ("ngram", "ngram_gpu", "suffix")
# Drafters that have no KV cache, or none that vLLM knows of.
CACHELESS_DRAFTERS = frozenset(
    {*MODEL_FREE_DRAFTERS, "medusa", "mlp_speculator", "custom_class"}
)


def check_drafter(engine: Engine) -> None:
    """Refuse drafters that can't obey the policy, or are told not to."""
    speculative = engine.vllm_config.speculative_config
    if speculative is None or speculative.method in CACHELESS_DRAFTERS:
        return
    allowed = POLICED_DRAFTERS | CACHELESS_DRAFTERS
    shares_layers = speculative.use_gemma4_mtp() or speculative.use_step3p5_mtp()
    model = speculative.draft_model_config.hf_config.model_type
    must(
        speculative.method in allowed and not shares_layers,
        "speculative_config.method",
        f"be one of {', '.join(sorted(allowed))} with --attention-backend sink",
        f"{speculative.method!r} ({model})",
        "choose one of them or drop --speculative-config",
    )
    backend = getattr(speculative.attention_backend, "name", BACKEND_NAME)
    must(
        backend == BACKEND_NAME,
        "speculative_config.attention_backend",
        "be SINK or unset with --attention-backend sink, so that the drafter obeys "
        "the policy, too",
        backend,
        "take it out of --speculative-config",
    )


def check_drafter_beside(engine: Engine, beside: str) -> None:
    """Refuse a drafter that can't be beside heads of two kinds.

    Its heads are in one group with the model's: :mod:`vllm_sink.cache.draft_heads` and,
    beside layers of other kinds, :mod:`vllm_sink.cache.draft_slots`.

    Args:
        beside: What asks for such heads, as a clause.
    """
    speculative, heads = engine.vllm_config.speculative_config, engine.config.head_map
    if speculative is None or heads is None:
        return
    allowed = (*MODEL_FREE_DRAFTERS, *KEEPS_EVERYTHING)
    must(
        speculative.method in allowed,
        "speculative_config.method",
        f"be one of {', '.join(allowed)} {beside}",
        f"{speculative.method!r}, whose layers are too many for a group of heads",
        "draft with one of them or drop --speculative-config",
    )
    model = engine.vllm_config.model_config
    if speculative.method in MODEL_FREE_DRAFTERS or model is None:
        return
    for name in ("disable_padded_drafter_batch", "parallel_drafting"):
        must(
            not getattr(speculative, name, False),
            f"speculative_config.{name}",
            f"be false {beside}: a drafter's slots must stay where they are",
            "true",
            "take it out of --speculative-config",
        )
    is_split = heads.splits_layers or has_layers_beside(model.is_hybrid, heads)
    own, other = (
        _shape(config, is_split) for config in (speculative.draft_model_config, model)
    )
    must(
        own == other,
        "speculative_config.model",
        f"have KV heads like those of the served model {beside}",
        f"{own}, not {other}",
        DRAFT_OTHERWISE,
    )


def _shape(model_config: ModelConfig, is_split: bool) -> str:
    """What a block of a head, or of a layer that isn't split, is made for."""
    size = f"heads of {model_config.get_head_size()}"
    return size if is_split else f"{model_config.get_total_num_kv_heads()} KV {size}"


def place_drafter(vllm_config: VllmConfig) -> None:
    """Give the drafter the attention backend of the model it drafts for.

    vLLM's runner V1 builds a drafter under ``speculative_config.attention_backend``
    and, where that is unset, under whatever the platform chooses; runner V2 under
    the target's. Stock attention would keep all of the drafter's cache, in a group
    of its own whose block table V1 does not hand to a ``draft_model`` drafter.
    Its rotary table gets a row for every position of the target's requests.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in POLICED_DRAFTERS:
        return
    text_config = speculative.draft_model_config.hf_text_config
    lengthen(text_config, vllm_config.model_config.max_model_len)
    if speculative.attention_backend is None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        speculative.attention_backend = AttentionBackendEnum[BACKEND_NAME]
