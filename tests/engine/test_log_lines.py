"""The start's lines and warnings about retrieval heads."""

from types import SimpleNamespace

import pytest

from tests.helpers.block_managers import make_manager
from tests.helpers.reference import random_heads, whole_layers
from tests.helpers.refusals import stub_config
from vllm_sink.engine import Engine
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start import log_lines

PAGE = 2 * 128 * 64 * 4  # K and V of a block in one of SmolLM2's heads, float32


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    said: list[str] = []
    say = SimpleNamespace(
        info=lambda text, *args: said.append(text % args),
        warning=lambda text, *args: said.append("WARNING " + text % args),
    )
    monkeypatch.setattr(log_lines, "logger", say)
    return said


def tell(max_model_len: int, page=PAGE, **settings) -> None:
    """Of a model with 30 layers of 3 KV heads, trained on 8,192 tokens."""
    vllm_config = stub_config(
        additional_config={
            "sink": {"num_sink_tokens": 4, "window_size": 252, **settings}
        },
        model_config__max_model_len=max_model_len,
        model_config__hf_text_config=SimpleNamespace(
            max_position_embeddings=8192, num_attention_heads=9
        ),
        model_config__get_total_num_hidden_layers=lambda: 30,
        model_config__get_total_num_kv_heads=lambda: 3,
        parallel_config__tensor_parallel_size=1,
        parallel_config__rank=0,
        cache_config__block_size=128,
    )
    spec = SimpleNamespace(page_size_bytes=page)
    engine = Engine.of(vllm_config)
    log_lines.log_retrieval_heads(engine, spec)


def test_sizes(lines):
    tell(8192, retrieval_heads=random_heads(45))
    assert lines == [
        "Retrieval heads: 45 of 90 KV heads keep everything, the others 4 + 252; a "
        "request holds 101.2 MiB at 4,096 tokens (dense 180.0), 191.2 MiB at 8,192 "
        "tokens (dense 360.0) on this worker, in 2 groups."
    ]


def test_whole_layers_and_a_window_of_their_own(lines):
    heads = whole_layers(*range(15))
    tell(65536, 3 * PAGE, retrieval_heads=heads, retrieval_window_size=4092)
    (line,) = lines
    assert "45 of 90 KV heads keep 4 + 4092 tokens, the others 4 + 252" in line
    # Both bounded: as much at 32k tokens as at 64k.
    sizes = [part.split()[-1] for part in line.split(" MiB at ")[:-1]]
    assert len(sizes) == 3 and sizes[1] == sizes[2]


def test_a_stream_past_the_trained_length_warns(lines):
    tell(16384, retrieval_heads=random_heads(45))
    assert lines[-1] == (
        "WARNING max_model_len 16384 is beyond the trained length 8192, and retrieval "
        "heads see true distances; set sink.retrieval_window_size to at most 8188 to "
        "keep them within it."
    )
    lines.clear()
    tell(16384, retrieval_heads=random_heads(45), retrieval_window_size=8188)
    tell(8192, retrieval_heads=random_heads(45))
    tell(16384, retrieval_heads=random_heads(0))
    tell(16384)
    assert [line.split(":")[0] for line in lines] == ["Retrieval heads"] * 2


@pytest.mark.parametrize(
    "heads, count", [(None, 1), ([[0, 0]], 1), ([[1, 1]], 1), ([[1, 0]], 0)]
)
def test_heads_of_two_kinds_have_no_line_of_a_group(heads, count):
    """Other heads are in the same pool: no group tells how many requests fit."""
    policy = RetentionPolicy(4, 60)
    sizes = {"max_model_len": 256, "max_in_flight_tokens": 64}
    managers = make_manager(policy, 16, 64, **sizes).coordinator.single_type_managers
    section = {"num_sink_tokens": 4, "window_size": 60, "retrieval_heads": heads}
    vllm_config = stub_config(
        additional_config={"sink": section},
        model_config__max_model_len=256,
        model_config__get_total_num_hidden_layers=lambda: 1,
        model_config__get_total_num_kv_heads=lambda: 2,
        model_config__hf_text_config=SimpleNamespace(num_attention_heads=2),
    )
    lines = log_lines.policy_lines(vllm_config, managers)
    assert len(lines) == count and all("first 4 and the last 60" in x for x in lines)
