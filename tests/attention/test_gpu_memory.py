"""Memory of a very long stream beside the KV cache: figures, block size, warning."""

import re
from types import SimpleNamespace

import pytest

from vllm_sink.attention.gpu_memory import (
    WARN_ABOVE,
    long_stream_bytes,
    long_stream_warning,
    preferred_block_size,
)


def config(max_model_len, max_num_seqs, block_size=16):
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        cache_config=SimpleNamespace(block_size=block_size),
    )


@pytest.mark.parametrize(
    "max_model_len,size",
    [(4096, 16), (131_072, 16), (131_073, 32), (1_000_000, 128), (10**9, 128)],
)
def test_blocks_grow_with_the_stream(max_model_len, size):
    assert preferred_block_size(16, max_model_len) == size


def test_bytes_of_a_million_tokens():
    """vLLM's default of 1,024 requests: 4.1 GB of host memory, 256 MB a table."""
    assert long_stream_bytes(1_000_000, 1024, 16, 1) == (4_096_000_000, 512_000_000)
    assert long_stream_bytes(1_000_000, 1024, 128, 2)[1] == 4 * 1024 * 4 * 7813


def test_the_warning_names_a_number_that_ends_it():
    assert long_stream_warning(config(131_072, 256)) is None
    text = long_stream_warning(config(1_000_000, 1024))
    assert "3.8 GiB of pinned host memory" in text and "0.48 GiB of GPU memory" in text
    found = re.search(r"--max-num-seqs (\d+)", text)
    assert found is not None
    number = int(found[1])
    assert long_stream_warning(config(1_000_000, number)) is None
    total = sum(long_stream_bytes(1_000_000, number + 1, 16, 1))
    assert total > WARN_ABOVE
