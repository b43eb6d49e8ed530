"""``vllm-sink size`` against the blocks and bytes that an engine allocated."""

import pytest
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

from tests.helpers.engine import core
from tests.zoo.models import Entry
from vllm_sink.policy.config import SinkConfig
from vllm_sink.tools.model_layers import read_config, read_shape

# Layers of state share the pool: their pages are no arithmetic of ours.
UNCOUNTED = {"LFM2", "Falcon-H1", "Nemotron-H", "Qwen3-Next"}
UNCOUNTED |= {"Zamba2", "Qwen3.5", "Qwen3.5 MoE"}


def check_size(entry: Entry, path: str, llm) -> None:
    """The same groups, bytes of a block and requests that fit."""
    config = llm.llm_engine.vllm_config
    cache = core(llm).scheduler.kv_cache_config
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    hf_config = read_config(path)
    if entry.name in UNCOUNTED:
        with pytest.raises(ValueError, match="read vLLM's own figure"):
            read_shape(hf_config, dtype)
        return
    shape = read_shape(hf_config, dtype)
    block_size = config.cache_config.block_size
    groups = sum(shape.num_groups(kind) for kind in shape.kinds[: shape.num_tables])
    assert groups == len(cache.kv_cache_groups)
    # Groups overlay each other in one allocation.
    pool_bytes = max(tensor.offset + tensor.size for tensor in cache.kv_cache_tensors)
    assert pool_bytes == cache.num_blocks * shape.pool_block_bytes(block_size)
    policy = SinkConfig.from_additional_config(config.additional_config).policy
    blocks = shape.request_blocks(
        policy,
        config.model_config.max_model_len,
        config.max_in_flight_tokens,
        block_size,
    )
    fit = get_max_concurrency_for_kv_cache_config(config, cache)
    assert cache.num_blocks / blocks == pytest.approx(fit)
