"""Which speculative drafters can obey the policy.

A drafter with a KV cache of its own is under the policy like the model it drafts
for: stock attention would keep all of its cache, in a group of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.refusal import Refusal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Drafters whose layers vLLM builds from its attention layers: under the policy.
POLICED_DRAFTERS = frozenset({"draft_model", "eagle", "eagle3", "mtp"})
# Drafters that have no KV cache, or none that vLLM knows of.
CACHELESS_DRAFTERS = frozenset(
    {"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator", "custom_class"}
)


def refuse_drafter(vllm_config: VllmConfig, _: SinkConfig) -> Iterator[Refusal]:
    """Drafters that can't obey the policy, or are told not to."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in CACHELESS_DRAFTERS:
        return
    allowed = POLICED_DRAFTERS | CACHELESS_DRAFTERS
    shares_layers = speculative.use_gemma4_mtp() or speculative.use_step3p5_mtp()
    if speculative.method not in allowed or shares_layers:
        model = speculative.draft_model_config.hf_config.model_type
        yield Refusal(
            "speculative_config.method",
            f"must be one of {', '.join(sorted(allowed))} with --attention-backend "
            "sink",
            f"{speculative.method!r} ({model})",
            "choose one of them or drop --speculative-config",
        )
    backend = speculative.attention_backend
    if backend is not None and backend.name != "SINK":
        yield Refusal(
            "speculative_config.attention_backend",
            "must be SINK or unset with --attention-backend sink, so that the "
            "drafter obeys the policy, too",
            backend.name,
            "take it out of --speculative-config",
        )
