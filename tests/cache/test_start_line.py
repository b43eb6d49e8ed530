"""What the start says of retrieval heads, and when it warns."""

from types import SimpleNamespace

import pytest

from tests.helpers.heads_reference import random_heads, whole_layers
from vllm_sink.cache import start_line
from vllm_sink.policy.config import SinkConfig

PAGE = 2 * 128 * 64 * 4  # K and V of a block in one of SmolLM2's heads, float32


class Engine:
    """The parts of vLLM's configuration that are read."""

    def __init__(self, max_model_len: int) -> None:
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self.parallel_config = SimpleNamespace(tensor_parallel_size=1, rank=0)
        self.cache_config = SimpleNamespace(block_size=128)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    said: list[str] = []
    say = SimpleNamespace(
        info=lambda text, *args: said.append(text % args),
        warning=lambda text, *args: said.append("WARNING " + text % args),
    )
    monkeypatch.setattr(start_line, "logger", say)
    return said


def tell(engine, page=PAGE, **settings) -> None:
    config = SinkConfig(4, 252, **settings)
    spec = SimpleNamespace(page_size_bytes=page)
    start_line.tell_once(engine, config, spec, 8192)


def test_sizes_once(lines):
    engine = Engine(8192)
    for _ in range(2):
        tell(engine, retrieval_heads=random_heads(45))
    assert lines == [
        "Retrieval heads: 45 of 90 KV heads keep everything, the others 4 + 252; a "
        "request holds 101.2 MiB at 4,096 tokens (dense 180.0), 191.2 MiB at 8,192 "
        "tokens (dense 360.0) on this worker, in 2 groups."
    ]


def test_whole_layers_and_a_window_of_their_own(lines):
    heads = whole_layers(*range(15))
    tell(Engine(65536), 3 * PAGE, retrieval_heads=heads, retrieval_window_size=4092)
    (line,) = lines
    assert "45 of 90 KV heads keep 4 + 4092 tokens, the others 4 + 252" in line
    # Both bounded: as much at 32k tokens as at 64k.
    sizes = [part.split()[-1] for part in line.split(" MiB at ")[:-1]]
    assert len(sizes) == 3 and sizes[1] == sizes[2]


def test_a_stream_past_the_trained_length_warns(lines):
    tell(Engine(16384), retrieval_heads=random_heads(45))
    assert lines[-1] == (
        "WARNING max_model_len 16384 is beyond the trained length 8192, and retrieval "
        "heads see true distances; set sink.retrieval_window_size to at most 8188 to "
        "keep them within it."
    )
    lines.clear()
    tell(Engine(16384), retrieval_heads=random_heads(45), retrieval_window_size=8188)
    tell(Engine(8192), retrieval_heads=random_heads(45))
    tell(Engine(16384), retrieval_heads=random_heads(0))
    tell(Engine(16384))
    assert [line.split(":")[0] for line in lines] == ["Retrieval heads"] * 2
