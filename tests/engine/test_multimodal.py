"""Rotations with several positions a token (images) are plain ones for text."""

import pytest
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from tests.helpers.engine import model_runner, prompt_logprobs, sink_engine
from tests.helpers.reference import load, logprobs
from vllm_sink.engine import Engine
from vllm_sink.rotation.measure import measure_model
from vllm_sink.rotation.table import Unknown

SINKS, WINDOW, LENGTH, VOCABULARY = 4, 60, 300, 512


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """A small random Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "fullatt_block_indexes": [0],
        },
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )
    folder = tmp_path_factory.mktemp("qwen2.5-vl")
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("importable_multimodal_models")
def test_several_positions_a_token(path, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 500, (LENGTH,), generator=generator).tolist()
    model = load(path, auto="Qwen2_5_VLForConditionalGeneration")
    want = logprobs(model, tokens, SINKS, WINDOW, "cache")
    far = logprobs(model, tokens, SINKS, WINDOW, "absolute")
    with sink_engine(
        path,
        SINKS,
        WINDOW,
        language_model_only=True,
        max_model_len=512,
        max_num_batched_tokens=96,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ) as llm:
        got = prompt_logprobs(llm, [tokens])[0]
        # Images would need an image processor, which needs torchvision: what a start
        # with them asks is asked of the engine without.
        runner = model_runner(llm)
        config = runner.vllm_config
        monkeypatch.setattr(
            config.model_config.multimodal_config, "language_model_only", False
        )
        layers = get_layers_from_vllm_config(config, Attention)
        found = measure_model(Engine.of(config), runner.get_model(), layers)
    assert (got - want).abs().max() < 2e-3
    assert (got - far).abs().max() > 0.04, "no turn to be seen"
    assert set(found) == set(layers) and layers
    for why in found.values():
        assert isinstance(why, Unknown)
        assert "pass --language-model-only" in why.seen
