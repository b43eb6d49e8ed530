"""Remedies start: the same command with the flags that a message prints."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.engine import model_runner, prompt_logprobs, sink_engine
from tests.helpers.random_llama import save_llama
from vllm_sink.rotation import rotary_rows, table_length
from vllm_sink.rotation.own_rotation import rotation_change

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
LONGROPE = {
    **BASE,
    "rope_type": "longrope",
    "original_max_position_embeddings": TRAINED // 4,
    "short_factor": [1.0 + 0.02 * i for i in range(16)],
    "long_factor": [1.5 + 0.4 * i for i in range(16)],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, **BASE}
KINDS = {
    "plain": {"rope_type": "default", **BASE},
    "linear": {"rope_type": "linear", "factor": 3.0, **BASE},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, betas of its own": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "longrope": LONGROPE,
    "longrope, trained on the short factors": LONGROPE
    | {"original_max_position_embeddings": TRAINED},
    "longrope, magnitudes of its own": LONGROPE
    | {"short_mscale": 1.1, "long_mscale": 1.2},
    "ntk": {"rope_type": "ntk", "factor": 4.0, **BASE},
    "dynamic": DYNAMIC,
    "dynamic, alpha": {"rope_type": "dynamic", "alpha": 100.0, **BASE},
    "dynamic, trained length of its own": DYNAMIC
    | {"max_trained_positions": TRAINED // 2},
}
# Kinds whose rotation an override of max_position_embeddings alone changes.
FRAGILE = {
    "longrope",
    "longrope, trained on the short factors",
    "dynamic, trained length of its own",
}
HEAD_SIZE = 32


def text_config(kind: str, **changes) -> SimpleNamespace:
    """What the remedies read of a text config."""
    return SimpleNamespace(
        **{
            "model_type": "llama",
            "max_position_embeddings": TRAINED,
            "rope_parameters": dict(KINDS[kind]),
            **changes,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_remedy_adds_rows_and_changes_none(kind):
    """By vLLM's own rotary modules; and where the blind override does, it is seen."""
    own = text_config(kind)
    assert rotary_rows.own_max_model_len(own) < ASKED
    blind = text_config(kind, max_position_embeddings=ASKED)
    seen = rotation_change(own, blind, HEAD_SIZE, ASKED)
    assert (seen is not None) == (kind in FRAGILE), seen
    remedied = text_config(kind, **rotary_rows.longer_table(own, ASKED))
    assert rotation_change(own, remedied, HEAD_SIZE, ASKED) is None
    assert ASKED <= rotary_rows.own_max_model_len(remedied) < ASKED + 8
    table, length = remedied.rope_parameters, remedied.max_position_embeddings
    assert num_built_rows(length, table) == rotary_rows.num_rows(length, table)


def num_built_rows(length: int, table: dict) -> int:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    settings = VllmConfig()
    settings.model_config = SimpleNamespace(max_model_len=ASKED)
    with set_current_vllm_config(settings):
        rotary = get_rope(HEAD_SIZE, length, rope_parameters=table)
    (rows,) = (buffer.shape[0] for buffer in rotary.buffers())
    if table["rope_type"] == "longrope":  # the short factors' rows come first
        rows -= table["original_max_position_embeddings"]
    return rows


@pytest.mark.parametrize(
    "changes, seen",
    [
        ({"rope_theta": 10001.0}, "moves them by .* at position 127"),
        ({"rope_type": "linear", "factor": 1.01}, "at position 127 .linear"),
        ({"rope_type": "yarn", "attention_factor": 1.001, **YARN}, "yarn"),
        ({"rope_theta": 10000.0}, None),
    ],
)
def test_another_rotation_is_seen(changes, seen):
    own = text_config("plain")
    changed = text_config("plain", rope_parameters={**KINDS["plain"], **changes})
    found = rotation_change(own, changed, HEAD_SIZE, TRAINED, set(changes))
    assert re.search(seen, found) if seen else found is None


def save_config(folder, kind: str) -> str:
    """A Llama's config; its architecture is known without a process of its own."""
    from transformers import LlamaConfig
    from vllm import ModelRegistry

    lazy = ModelRegistry.models["LlamaForCausalLM"]
    if hasattr(lazy, "module_name"):
        ModelRegistry.register_model("LlamaForCausalLM", lazy.load_model_cls())
    LlamaConfig(
        **TINY,
        architectures=["LlamaForCausalLM"],
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=TRAINED,
        rope_parameters=KINDS[kind],
    ).save_pretrained(folder)
    return str(folder)


def configure(model: str, **settings):
    """The engine's configuration, as it is checked before anything is loaded."""
    from vllm import EngineArgs

    sink = {"sink": {"num_sink_tokens": 4, "window_size": 20}}
    return EngineArgs(
        model,
        attention_backend="sink",
        additional_config=sink,
        skip_tokenizer_init=True,
        **{"max_model_len": ASKED, **settings},
    ).create_engine_config()


BLIND = {"max_position_embeddings": ASKED}


@pytest.mark.parametrize(
    "kind, settings, remedy",
    [
        ("longrope", {"hf_overrides": BLIND}, "pass --hf-overrides"),
        (
            "longrope",
            {"hf_overrides": {**BLIND, "rms_norm_eps": 1e-5}, "max_model_len": 100},
            """pass --hf-overrides '{"rms_norm_eps": 1e-05}' \\(""",
        ),
        (
            "longrope",
            {"hf_overrides": BLIND, "max_model_len": 100},
            r"drop --hf-overrides \(",
        ),
        (
            "plain",
            {"hf_overrides": {**BLIND, "rope_parameters": YARN}},
            """pass --hf-overrides '{"max_position_embeddings": 1000}'""",
        ),
        (
            "plain",
            {"hf_overrides": lambda config: config.update(BLIND_YARN) or config},
            "got a function, which moves .*; have it leave them",
        ),
    ],
)
def test_an_override_that_changes_the_rotation_is_refused(
    kind, settings, remedy, tmp_path
):
    model = save_config(tmp_path, kind)
    with pytest.raises(Exception, match="must rotate the positions below") as e:
        configure(model, **settings)
    message = str(e.value)
    assert re.search(remedy, message), message
    if "pass --hf-overrides" in message:
        configure(model, **{**settings, **as_settings(message)})


BLIND_YARN = {**BLIND, "rope_parameters": YARN}


def test_overrides_for_a_nested_text_config():
    from transformers import LlavaConfig, Phi3Config

    text = Phi3Config(
        **TINY,
        num_attention_heads=2,
        max_position_embeddings=TRAINED,
        original_max_position_embeddings=TRAINED // 4,
        rope_parameters=LONGROPE,
        pad_token_id=0,
    )
    config = LlavaConfig(text_config=text)
    others = {"text_config": {"rms_norm_eps": 1e-5}}
    found = table_length.longer_overrides(config, config.text_config, ASKED, others)
    inner = found.pop("text_config")
    assert not found
    assert inner["max_position_embeddings"] == ASKED
    assert inner["rope_parameters"]["long_mscale"] == pytest.approx(1.1832, abs=1e-4)
    assert inner["rms_norm_eps"] == 1e-5


@pytest.mark.parametrize("asked", [TRAINED, ASKED])
def test_the_flag_is_printed(asked, tmp_path, capsys):
    """And it is what a command needs."""
    model = save_config(tmp_path, "yarn")
    assert table_length.main([model, str(asked)]) == 0
    printed = capsys.readouterr().out
    if asked == TRAINED:
        assert printed == ""
    else:
        configure(model, **as_settings(f"; pass {printed}"))


def test_no_flag_for_a_rotation_of_an_unknown_kind(tmp_path, capsys):
    assert table_length.main([str(tmp_path), "9"]) == 1
    assert table_length.main(["m"]) == 2
    text = SimpleNamespace(
        model_type="m",
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": "deepseek_yarn", **BASE},
    )
    model = SimpleNamespace(hf_overrides={}, hf_config=text, hf_text_config=text)
    remedy = table_length.max_model_len_remedy
    assert remedy(model, ASKED, 256) == "pass --max-model-len 256"
    assert remedy(None, ASKED, 256) == "pass --max-model-len 256"


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
        layer.impl.rotation.rows
        for layer in model_runner(llm)
        .attn_groups[0][0]
        .get_metadata_builder()
        .layers.values()
    ]


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_longer_table(kind, tmp_path, monkeypatch):
    model = save_llama(
        tmp_path,
        **TINY,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=TRAINED,
        rope_parameters=KINDS[kind],
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
            assert len(layer.impl.rotation.rows) >= ASKED


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
