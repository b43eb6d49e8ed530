"""Settings that end the start beside retrieval heads, by name."""

import math

import pytest
from vllm import EngineArgs

from tests.helpers.reference import random_heads, whole_layers


def configure(model_path, heads=None, **settings):
    section = {"retrieval_heads": random_heads(45) if heads is None else heads}
    return EngineArgs(
        model_path,
        attention_backend="sink",
        additional_config={"sink": section},
        max_model_len=1024,
        **settings,
    ).create_engine_config()


NAN = whole_layers(3)
NAN[7][1] = math.nan


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"disable_hybrid_kv_cache_manager": True},
            "disable_hybrid_kv_cache_manager must be false .* drop --disable-hybrid",
        ),
        (
            {"kv_sharing_fast_prefill": True},
            "kv_sharing_fast_prefill must be false .* drop --kv-sharing-fast-prefill",
        ),
        (
            {"hf_overrides": {"layer_types": ["sliding_attention"] * 30}},
            "retrieval_heads must be left out .* without a layer of full attention, .* "
            "leave sink.retrieval_heads and sink.retrieval_layers out",
        ),
        ({"heads": [[1, 0]] * 30}, "30 layers x 3 KV heads .* got 30 layers x 2 heads"),
        ({"heads": [[1, 0, 0]] * 32}, "got 32 layers x 3 heads"),
        ({"heads": NAN}, "got nan at layer 7, head 1"),
        ({"heads": "nowhere/heads.tsv"}, "readable file, got 'nowhere/heads.tsv'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(model_path, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(model_path, **settings)


def test_a_drafter_with_layers(model_path):
    drafter = {"method": "draft_model", "model": model_path}
    with pytest.raises(ValueError, match=r"speculative_config\.method must be one"):
        configure(
            model_path, speculative_config={**drafter, "num_speculative_tokens": 2}
        )


def test_the_configuration_carries_values(model_path, tmp_path):
    """What goes to the workers names no file."""
    pattern = tmp_path / "heads.tsv"
    pattern.write_text("0.1\t0.9\t0.5\n" * 30)
    config = configure(model_path, str(pattern))
    assert config.additional_config["sink"] == {"retrieval_heads": [[0, 1, 1]] * 30}
