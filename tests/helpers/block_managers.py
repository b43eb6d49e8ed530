"""vLLM's KVCacheManager over groups of layers under the sink policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
)

from vllm_sink.cache.spec import RetrievalSpec, SinkSpec
from vllm_sink.plugin import compat
from vllm_sink.policy.layout import RetentionPolicy


def sink_spec(policy: RetentionPolicy, block_size: int) -> SinkSpec:
    return SinkSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=16,
        dtype=torch.float32,
        sliding_window=policy.window_size,
        num_sink_tokens=policy.num_sink_tokens,
    )


def full_spec(block_size: int) -> RetrievalSpec:
    """Of a layer, or a head, that keeps everything."""
    return RetrievalSpec(
        block_size=block_size, num_kv_heads=1, head_size=16, dtype=torch.float32
    )


def make_manager(
    policy: RetentionPolicy,
    block_size: int,
    num_blocks: int,
    *,
    other_specs: Sequence[KVCacheSpec] = (),
    **config,
) -> KVCacheManager:
    """A manager of one group under ``policy``, and of others."""
    specs = [sink_spec(policy, block_size), *other_specs]
    return manager_of_specs(specs, num_blocks, **config)


def manager_of_specs(
    specs: Sequence[KVCacheSpec],
    num_blocks: int,
    *,
    max_model_len: int,
    max_in_flight_tokens: int,
    **config,
) -> KVCacheManager:
    """A manager of ``num_blocks`` blocks, the null block included, a group a spec.

    Args:
        config: Of vLLM's ``KVCacheConfig``. An engine's retention interval is 0
            unless a user gives one.
    """
    compat.register_kv_cache_spec()
    config = {"prefix_cache_retention_interval": 0} | config
    sizes = [spec.block_size for spec in specs]
    return KVCacheManager(
        KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)
            ],
            **config,
        ),
        max_model_len=max_model_len,
        scheduler_block_size=math.lcm(*sizes),
        hash_block_size=math.gcd(*sizes),
        max_in_flight_tokens=max_in_flight_tokens,
    )
