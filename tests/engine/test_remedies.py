"""What a message tells the user to type starts the same command."""

import json
import re
import shlex

import pytest
import torch

from tests.helpers.engine import model_runner, prompt_logprobs, sink_engine
from tests.helpers.random_llama import save_llama

TRAINED, ASKED = 128, 1000
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
}
BASE = {"rope_theta": 10000.0}
YARN = {
    **BASE,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED // 4,
}
LLAMA3 = {
    **BASE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
KINDS = {
    "plain": {"rope_type": "default", **BASE},
    "linear": {"rope_type": "linear", "factor": 4.0, **BASE},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, betas of its own": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
}


def save_nested(folder) -> str:
    """A multimodal model, whose text config is an inner one."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(
        **TINY,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=TRAINED,
        rope_parameters=YARN,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def start(model, **settings):
    defaults = {"skip_tokenizer_init": True, "max_model_len": ASKED, "max_num_seqs": 2}
    return sink_engine(model, 4, 20, **(defaults | settings))


def as_settings(message: str) -> dict:
    """The flags of a message's "pass …", read as a shell reads them."""
    words = shlex.split(re.search(r"; pass (--.*)", message).group(1))
    flags = {
        "--hf-overrides": json.loads,
        "--max-model-len": int,
        "--kv-cache-dtype": str,
    }
    return {
        words[0].removeprefix("--").replace("-", "_"): flags[words[0]](words[1]),
    }


def tables(llm) -> list[torch.Tensor]:
    return [
        layer.impl.rotation.cos_sin_cache
        for layer in model_runner(llm)
        .attn_groups[0][0]
        .get_metadata_builder()
        .layers.values()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_longer_table(kind, tmp_path, monkeypatch):
    model = save_llama(
        tmp_path, **TINY, max_position_embeddings=TRAINED, rope_parameters=KINDS[kind]
    )
    with start(model, max_model_len=TRAINED) as llm:
        (short,) = tables(llm)
    check(model, short, monkeypatch)


def check(model, short, monkeypatch, **settings):
    """Refused, started as told, and no position is rotated otherwise than before."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with (
        pytest.raises(ValueError, match=f"the rows of the rotary .* got {ASKED}") as e,
        start(model, max_model_len=ASKED, **settings),
    ):
        pass
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    remedy = as_settings(str(e.value))
    with start(model, **(settings | remedy)) as llm:
        (long,) = tables(llm)
        assert llm.llm_engine.vllm_config.model_config.max_model_len == ASKED
    assert ASKED <= len(long) < ASKED + 8
    # Past the trained length angles are exact; a row is one to rounding.
    assert (long[: len(short)] - short).abs().max() < 1e-4


@pytest.mark.usefixtures("importable_multimodal_models")
def test_nested_text_config_beside_other_overrides(tmp_path, monkeypatch):
    model = save_nested(tmp_path)
    mine = {
        "language_model_only": True,
        "hf_overrides": {"text_config": {"rms_norm_eps": 1e-5}, "image_seq_length": 4},
    }
    with start(model, max_model_len=TRAINED, **mine) as llm:
        (short,) = tables(llm)
    check(model, short, monkeypatch, **mine)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_drafters_table_is_lengthened(kind, tmp_path):
    """vLLM passes it no override of the command line; none is needed."""
    target = save_llama(tmp_path / "t", **TINY, max_position_embeddings=ASKED)
    draft = save_llama(
        tmp_path / "d",
        **TINY,
        max_position_embeddings=TRAINED,
        rope_parameters=KINDS[kind],
    )
    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": 2}
    with start(target, speculative_config=speculative) as llm:
        (group,) = model_runner(llm).drafter.draft_attn_groups
        layers = group.get_metadata_builder().layers
        assert layers
        for layer in layers.values():
            assert len(layer.impl.rotation.cos_sin_cache) >= ASKED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_that_orders_an_fp8_cache(dtype, tmp_path):
    """The user gave no flag that could be dropped."""
    model = save_llama(tmp_path, **TINY, max_position_embeddings=ASKED)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    order = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "format": "dense",
        "kv_cache_scheme": scheme | {"symmetric": True},
    }
    config = tmp_path / "config.json"
    text = json.loads(config.read_text()) | {"quantization_config": order}
    config.write_text(json.dumps(text))
    message = (
        "--kv-cache-dtype must be .* on a CPU, got fp8, which the checkpoint asks for; "
        "pass --kv-cache-dtype bfloat16"
    )
    with pytest.raises(ValueError, match=message) as e, start(model, dtype=dtype):
        pass
    with start(model, dtype=dtype, **as_settings(str(e.value))) as llm:
        (logprobs,) = prompt_logprobs(llm, [list(range(3, 60))])
    assert logprobs.isfinite().all()


def test_no_override_keeps_a_dynamic_rotation():
    """Its frequencies depend on the length: then fewer positions are the remedy."""
    from types import SimpleNamespace

    from vllm_sink.policy.table_length import max_model_len_remedy

    text = SimpleNamespace(
        model_type="llama",
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, **BASE},
    )
    model = SimpleNamespace(hf_overrides={}, hf_config=text, hf_text_config=text)
    assert max_model_len_remedy(model, ASKED, 256) == "pass --max-model-len 256"
    assert max_model_len_remedy(None, ASKED, 256) == "pass --max-model-len 256"
