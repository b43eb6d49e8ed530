"""Models that may need no sink tokens, told from their configuration.

Two designs weaken the first tokens' pull: a learned *sink logit* in the softmax's
denominator (not a token: it takes no cache), and a *gated attention output*, which lets
a head say nothing without a place to look at (arXiv 2505.06708). Whether a model
with either still needs sink tokens is measured, never assumed.
"""

from __future__ import annotations

from typing import Any

# model_type -> where; as transformers 5.19 and vLLM 0.32 build them.
SINK_LOGITS = {
    "gpt_oss": "all layers",
    "granite_swa": "all layers",
    "granitemoe_swa": "all layers",
    "mimo_v2": "the windowed layers",
    "mimo_v2_flash": "the windowed layers",
}
GATED_OUTPUT = (
    "afmoe",
    "axk2",
    "hy_v4",
    "laguna",
    "muse_glimmer",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen4_exp",
    "step3p5",
    "step3p7",
)
# Settings that say the same for a model that is not listed.
LOGIT_KEYS = ("attention_sink", "sink_bias", "softmax_offset")
GATE_KEYS = ("attn_output_gate", "gated_attention", "head_wise_attn_gate")


def by_design(config: Any) -> list[str]:
    """What the configuration has that may make sink tokens unnecessary.

    Args:
        config: Transformers' configuration of the model.
    """
    text = config.get_text_config()
    kinds = {text.model_type, text.model_type.removesuffix("_text")}
    found = []
    for kind in sorted(kinds & SINK_LOGITS.keys()):
        found.append(
            f"learned sink logits in {SINK_LOGITS[kind]} (model_type {kind}); they are "
            "no tokens and take no cache"
        )
    for kind in sorted(kinds & set(GATED_OUTPUT)):
        found.append(f"a gated attention output (model_type {kind})")
    settings = {key: value for key, value in text.to_dict().items() if value}
    for words, what in ((LOGIT_KEYS, "sink logits"), (GATE_KEYS, "a gated output")):
        found += [
            f"{what} ({key}={value!r})"
            for key, value in settings.items()
            if any(word in key for word in words) and isinstance(value, (bool, str))
        ]
    return found


def verdict(found: list[str], perplexities: dict[int, float]) -> list[str]:
    """Lines on the design, with S = 0, 1 and 4 as they were measured."""
    if not found:
        return []
    sizes = [size for size in (0, 1, 4) if size in perplexities]
    values = ", ".join(f"S = {size}: {perplexities[size]:.2f}" for size in sizes)
    return [
        f"By its configuration the model has {' and '.join(found)}: it may need no "
        f"sink tokens. Measured, not assumed: perplexity at {values}."
    ]
