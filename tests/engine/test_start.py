"""Policies that no layer would obey end the start, on every platform.

On the CPU our platform class refuses in the process that reads the command. On
CUDA and ROCm it isn't there: ``as_on_cuda`` takes its part away.
"""

import re

import pytest
import torch
import vllm.config

from tests.helpers.engine import core, model_runner, sink_engine
from tests.helpers.random_llama import save_big_code, save_llama
from tests.helpers.refusals import stub_config
from vllm_sink.plugin import compat
from vllm_sink.start import checks, hook

SECTION = {"sink": {"num_sink_tokens": 4, "window_size": 60}}
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}
FORGOTTEN = (
    r"--attention-backend must be sink where --additional-config has a sink section, "
    r"got .* and the section \{'num_sink_tokens': 4, 'window_size': 60\}; pass "
    r"--attention-backend sink, or take the section away"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **TINY)


def refused(message, model, **settings):
    settings = {"skip_tokenizer_init": True, "max_model_len": 256} | settings
    with pytest.raises(ValueError, match=message), sink_engine(model, **settings):
        pass


def test_forgotten_flag(model):
    refused(FORGOTTEN, model, additional_config=SECTION)


def test_forgotten_flag_as_on_cuda(model, as_on_cuda):
    refused(FORGOTTEN, model, additional_config=SECTION)


def test_refusals_as_on_cuda(model, as_on_cuda):
    """What the platform class would have refused, the first module does."""
    refused(
        "unknown key 'sinks'",
        model,
        attention_backend="sink",
        additional_config={"sink": {"sinks": 4}},
    )


def test_without_the_section_nothing_is_asked(model, monkeypatch):
    seen = []
    real = checks.refuse_forgotten_backend
    monkeypatch.setattr(
        checks, "refuse_forgotten_backend", lambda c: (seen.append(c), real(c))
    )
    with sink_engine(model, max_model_len=256, skip_tokenizer_init=True) as llm:
        config = core(llm).vllm_config
        # vLLM builds models under their configuration, and torch tells of modules:
        # the seam that a platform which isn't ours depends on.
        assert any(config is other for other in seen)
        assert config.attention_config.backend is None


@pytest.mark.parametrize("where", ["as_on_cuda", "cpu"])
def test_own_windows_in_every_layer(where, tmp_path, request):
    if where == "as_on_cuda":
        request.getfixturevalue(where)
    from transformers import MistralConfig, MistralForCausalLM

    small = {"vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**TINY, **small, sliding_window=64)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    refused(
        "must have a layer with full attention for --attention-backend sink and its "
        "sink section to act on, got .* whose layers all keep a window of 64 tokens",
        str(tmp_path),
        attention_backend="sink",
        additional_config=SECTION,
    )


def test_only_layers_with_own_windows_selected(tmp_path):
    """``backend_per_kind`` may leave out the only layers that the policy is for."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    small = {"vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma3TextConfig(
        **TINY,
        **small,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    settings = {"additional_config": SECTION, "attention_backend": "sink"}
    refused(
        "got True for .* with full_attention, sliding_attention; drop --disable-hybrid",
        str(tmp_path),
        **settings,
        disable_hybrid_kv_cache_manager=True,
    )
    refused(
        "every layer with full attention must obey .* got CPU_ATTN for .*layers.1",
        str(tmp_path),
        additional_config=SECTION,
        attention_config={"backend_per_kind": {"sliding_window": "SINK"}},
    )


def test_a_wrong_number_of_heads(tmp_path):
    """In `absolute`, too, where no rotation is measured: the answer would be NaN."""
    refused(
        r"num_key_value_heads must be the model's .* got 4 and 4 on a worker for "
        r"model\.h\.0\.attn\.attn, where 4 tokens have 4 rows of queries and 1 of keys",
        save_big_code(tmp_path, num_key_value_heads=4),
        attention_backend="sink",
        additional_config={"sink": SECTION["sink"] | {"sink_positions": "absolute"}},
    )


def test_a_vllm_whose_groups_nobody_can_see(monkeypatch):
    monkeypatch.setattr(compat, "_AFTER_SCHEDULER", "no_such_method")
    why = compat.watch_engine_core(print)
    assert re.search(r"0\.32 or 0\.33 with .* whose KV cache groups can't be ch", why)
    parent, child = torch.nn.Module(), torch.nn.Module()
    vllm_config = stub_config()
    monkeypatch.setattr(
        vllm.config, "get_current_vllm_config_or_none", lambda: vllm_config
    )
    with pytest.raises(ValueError, match=re.escape(why)):
        hook.on_module(why, parent, "child", child)


@pytest.mark.usefixtures("importable_multimodal_models")
def test_images_seen_both_ways(tmp_path):
    """Gemma 3 of 4B and more; vLLM's own selector has another message on CUDA."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {"num_attention_heads": 2, "num_key_value_heads": 1}
    text = {**TINY, **small, "vocab_size": 512, "head_dim": 32, "sliding_window": 32}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    types = ["sliding_attention", "full_attention"]
    config = Gemma3Config(
        text_config=text | {"layer_types": types},
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=500,
        eoi_token_index=501,
        image_token_index=502,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    settings = {"additional_config": SECTION, "attention_backend": "sink"}
    refused(
        "must not look both ways .*; pass --language-model-only to serve its text",
        str(tmp_path),
        **settings,
    )
    with sink_engine(
        str(tmp_path),
        **settings,
        max_model_len=256,
        skip_tokenizer_init=True,
        language_model_only=True,
    ) as llm:
        groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
        kinds = {type(group.kv_cache_spec).__name__ for group in groups}
        assert kinds == {"SinkSpec", "OwnWindowSpec"}


def test_numbers_beyond_32_bits_are_full_attention(model):
    """On both paths: what the kernels count with is clipped to the longest request."""
    huge = {"sink": {"num_sink_tokens": 2**40, "window_size": 2**50}}
    with sink_engine(
        model,
        attention_backend="sink",
        additional_config=huge,
        max_model_len=256,
        skip_tokenizer_init=True,
    ) as llm:
        (group,) = core(llm).scheduler.kv_cache_config.kv_cache_groups
        builder = model_runner(llm).attn_groups[0][0].get_metadata_builder()
        for policy in (group.kv_cache_spec.policy, builder.policy):
            assert (policy.num_sink_tokens, policy.window_size) == (256, 256)
