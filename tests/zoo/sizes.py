"""``vllm-sink size`` against the blocks and bytes that an engine allocated."""

import pytest
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

from tests.helpers.engine import core
from tests.zoo.models import Entry
from vllm_sink.cache.slot_groups import SlotGroups
from vllm_sink.engine import Engine
from vllm_sink.policy.config import SinkConfig
from vllm_sink.tools import sizing
from vllm_sink.tools.model_layers import read_config, read_shape

# Layers of state share the pool: their pages are no arithmetic of ours.
# --block-size: vLLM makes its own setting the smallest of the groups' in the end.
GIVEN = 32
UNCOUNTED = {"LFM2", "Zamba2"}


def check_size(entry: Entry, path: str, llm) -> None:
    """The same groups, bytes of a block and requests that fit."""
    config = llm.llm_engine.vllm_config
    cache = core(llm).scheduler.kv_cache_config
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    hf_config = read_config(path)
    hf_config.mamba_ssm_dtype = "float32"  # vLLM's choice on a CPU
    if entry.name in UNCOUNTED:
        with pytest.raises(ValueError, match="read vLLM's own figure"):
            read_shape(hf_config, dtype)
        return
    caches = config.cache_config.enable_prefix_caching
    shape = read_shape(hf_config, dtype, caches_prefixes=caches)
    block_size = GIVEN
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


def check_size_of_heads(entry: Entry, path: str, llm) -> None:
    """The plan's groups and bytes are the pool's; the calculator's are the plan's."""
    config = llm.llm_engine.vllm_config
    groups = Engine.of(config).head_groups
    if not isinstance(groups, SlotGroups):
        return
    memory = groups.plan(config)
    cache = core(llm).scheduler.kv_cache_config
    assert len(cache.kv_cache_groups) == memory.grouping.num_groups
    pool_bytes = max(tensor.offset + tensor.size for tensor in cache.kv_cache_tensors)
    assert pool_bytes == cache.num_blocks * memory.pool_block_bytes
    blocks = memory.blocks(
        config.model_config.max_model_len, config.max_in_flight_tokens
    )
    fit = get_max_concurrency_for_kv_cache_config(config, cache)
    assert cache.num_blocks / blocks == pytest.approx(fit)
    if entry.name in UNCOUNTED:
        return
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    hf_config = read_config(path)
    hf_config.mamba_ssm_dtype = "float32"  # vLLM's choice on a CPU
    caches = config.cache_config.enable_prefix_caching
    shape = read_shape(hf_config, dtype, caches_prefixes=caches)
    settings = SinkConfig.from_additional_config(config.additional_config)
    assert sizing.slot_memory(shape, settings, 1, GIVEN) == memory
