"""Refusals of a loaded model's layers, on stand-ins for the layers."""

import pytest
import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from tests.helpers.refusals import Config, drafter, stub_config
from vllm_sink.attention.backend import SinkBackend, place_layer
from vllm_sink.engine import Engine
from vllm_sink.start.loaded import refuse_layers

SHAPE = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 64,
    "dtype": torch.float32,
}
FULL = FullAttentionSpec(**SHAPE)
OTHER_HEADS = FullAttentionSpec(**(SHAPE | {"num_kv_heads": 1}))
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=32)
CHUNKED = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=32)
OTHER_VALUES = FullAttentionSpec(**SHAPE, head_size_v=32)
STATE = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))


class Layer(AttentionLayerBase):
    def __init__(self, spec, backend=SinkBackend):
        self.spec, self.backend = spec, backend

    def get_attn_backend(self):
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


def refuse(*layers, **changes):
    context = {f"layers.{i}": layer for i, layer in enumerate(layers)}
    settings = {
        "compilation_config": Config(static_forward_context=context),
        "use_v2_model_runner": False,
    }
    config = stub_config(**(settings | changes))
    engine = Engine.of(config)
    for layer in layers:
        layer.attn_backend = layer.backend
        place_layer(engine, layer)
    refuse_layers(engine, FULL)


def test_what_obeys():
    refuse(Layer(FULL))
    refuse(Layer(FULL), Layer(WINDOW), Layer(STATE, None))
    refuse(Layer(None), Layer(FULL))  # shares another layer's cache


@pytest.mark.parametrize(
    "layers, message",
    [
        (
            [Layer(FULL), Layer(FULL, CPUAttentionBackend)],
            "every layer .* must obey .* got CPU_ATTN for layers.1; select sink",
        ),
        ([Layer(FULL), Layer(CHUNKED)], "chunked-local .* got layers.1; drop"),
        ([Layer(OTHER_VALUES)], "got 32 and 64 in layers.0; drop"),
        ([Layer(WINDOW)], r"must have a layer .*another kind \(OwnWindowSpec\)"),
        ([], "must have a layer with full attention for --attention-backend sink"),
    ],
)
def test_what_does_not(layers, message):
    with pytest.raises(ValueError, match=message):
        refuse(*layers)


def test_a_stage_of_a_pipeline_may_have_windows_alone():
    refuse(Layer(WINDOW), parallel_config__pipeline_parallel_size=2)


def test_draft_model_needs_one_group_on_v1():
    asked = {"speculative_config": drafter("draft_model")}
    refuse(Layer(FULL), Layer(OTHER_HEADS), **asked)
    message = "'draft_model' on model runner V1 .* got OwnWindowSpec, SinkSpec; ch"
    with pytest.raises(ValueError, match=message):
        refuse(Layer(FULL), Layer(WINDOW), **asked)
    refuse(Layer(FULL), Layer(WINDOW), **asked, use_v2_model_runner=True)
    refuse(Layer(FULL), Layer(WINDOW), speculative_config=drafter("eagle"))
