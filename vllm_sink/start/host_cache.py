"""Host memory behind the pool: its settings, what they can't go with, its line.

``--kv-transfer-config`` is vLLM's own flag for all that lies behind the pool, and the
only one that reaches scheduler and workers on every platform before they are made.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from vllm_sink.engine import Engine
from vllm_sink.policy.layout import cdiv
from vllm_sink.start.log_lines import format_bytes
from vllm_sink.start.must import must

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

CONNECTOR = "SinkHostCache"
SETTING = "kv_connector_extra_config.host_cache_gib"
DROP = "drop --kv-transfer-config"
EXAMPLE = (
    f"""--kv-transfer-config '{{"kv_connector": "{CONNECTOR}", "kv_role": "kv_both", """
    """"kv_connector_extra_config": {"host_cache_gib": 20}}'"""
)
ELSE = "for a model whose layers keep something else than keys and values of tokens"
# Where layers or heads keep everything, a chat's blocks depend on its length.
CHAT_TOKENS = 32768


def host_bytes(transfer: Any) -> int:
    """Host memory of one engine, all its workers together, in bytes."""
    return int(transfer.kv_connector_extra_config["host_cache_gib"] * 2**30)


def check_connector(engine: Engine) -> None:
    """Refuse connectors but ours, and settings under which ours can't work."""
    vllm_config = engine.vllm_config
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    path = getattr(transfer, "kv_connector_module_path", None)
    drop = DROP
    if getattr(vllm_config.cache_config, "kv_offloading_size", None) is not None:
        drop = "drop --kv-offloading-size"
    must(
        transfer.kv_connector == CONNECTOR and not path,
        "kv_connector",
        f"be {CONNECTOR} or unset with --attention-backend sink",
        repr(transfer.kv_connector) + (f" of {path}" if path else ""),
        "others bring a window back without its sinks, or keep what another policy "
        f"can't read: {drop}, or pass {EXAMPLE}",
    )
    _check_settings(transfer)
    model = vllm_config.model_config
    must(
        model is None or not model.is_hybrid,
        "kv_connector",
        f"be unset {ELSE}",
        f"{CONNECTOR} for {model and model.model!r}, which has layers with states",
        DROP,
    )
    must(
        bool(vllm_config.cache_config.enable_prefix_caching),
        "enable_prefix_caching",
        f"be true for {CONNECTOR}",
        "false",
        "drop --no-enable-prefix-caching",
    )
    must(
        vllm_config.parallel_config.pipeline_parallel_size == 1,
        "pipeline_parallel_size",
        f"be 1 for {CONNECTOR}",
        vllm_config.parallel_config.pipeline_parallel_size,
        "use tensor parallelism",
    )


def _check_settings(transfer: Any) -> None:
    extra = transfer.kv_connector_extra_config
    for key, value in extra.items():
        must(
            key == "host_cache_gib",
            f"kv_connector_extra_config.{key}",
            f"be host_cache_gib, the one setting of {CONNECTOR}",
            f"the unknown key with value {value!r}",
            f"remove or rename it: pass {EXAMPLE}",
        )
    size = extra.get("host_cache_gib")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    is_number = isinstance(size, (int, float)) and not isinstance(size, bool)
    must(
        is_number and 0 < size < memory,
        SETTING,
        f"be a number of GiB above 0 and below this machine's {memory:.0f}",
        repr(size),
        f"pass {EXAMPLE}",
    )
    must(
        transfer.kv_role == "kv_both",
        "kv_role",
        f"be kv_both for {CONNECTOR}",
        repr(transfer.kv_role),
        f"pass {EXAMPLE}",
    )


def _specs(config: KVCacheConfig) -> list[KVCacheSpec]:
    """One spec of each group."""
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    return [
        next(iter(inner.values()))
        if (inner := getattr(spec, "kv_cache_specs", None))
        else spec
        for spec in specs
    ]


def check_layers(config: KVCacheConfig) -> None:
    """Refuse layers whose state isn't keys and values of tokens, or not the policy's.

    Raises:
        ValueError: Names the group's first layer.
    """
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_sink.cache.spec import SinkSpec

    specs = _specs(config)
    for group, spec in zip(config.kv_cache_groups, specs, strict=True):
        must(
            isinstance(spec, AttentionSpec),
            "kv_connector",
            f"be unset {ELSE}",
            f"{type(spec).__name__} of {group.layer_names[0]}",
            DROP,
        )
    must(
        any(isinstance(spec, SinkSpec) for spec in specs),
        "kv_connector",
        f"be another than {CONNECTOR} where no layer is under --attention-backend sink",
        f"layers of {type(specs[0]).__name__}",
        f"pass --attention-backend sink, or {DROP}",
    )


def chat_blocks(config: KVCacheConfig, num_tokens: int) -> int:
    """Blocks of the pool that the host keeps of a chat of so many tokens."""
    from vllm_sink.cache.host.lookup import policy_of

    specs = _specs(config)
    unit = math.lcm(*(spec.block_size for spec in specs))  # a hit is a multiple of it
    count = 0
    for spec in specs:
        blocks = cdiv(num_tokens, spec.block_size)
        policy = policy_of(spec)
        if policy is not None:
            # Of a hit, and of one that ends a unit earlier.
            windowed = policy.blocks_before_hit(spec.block_size)
            windowed += unit // spec.block_size
            blocks = min(blocks, policy.num_sink_blocks(spec.block_size) + windowed)
        count += blocks
    return count


def host_line(vllm_config: VllmConfig, config: KVCacheConfig, num_slots: int) -> str:
    """How many idle chats the host keeps.

    Args:
        num_slots: Blocks of the pool that it holds.

    Raises:
        ValueError: It keeps none.
    """
    from vllm_sink.cache.host.lookup import policy_of
    from vllm_sink.cache.host.worker import slot_bytes

    max_model_len = vllm_config.model_config.max_model_len
    is_bounded = all(policy_of(spec) for spec in _specs(config))
    length = max_model_len if is_bounded else min(CHAT_TOKENS, max_model_len)
    blocks = chat_blocks(config, length)
    size = slot_bytes(config) * vllm_config.parallel_config.world_size
    must(
        num_slots >= blocks,
        SETTING,
        f"hold a chat, {blocks * size / 2**30:.3f} GiB",
        f"{num_slots * size / 2**30:.3f}",
        f"give more, or {DROP}",
    )
    which = "of any length" if is_bounded else f"of {length:,} tokens"
    return (
        f"Host cache: {num_slots:,} blocks ({format_bytes(num_slots * size)}) keep "
        f"about {num_slots // blocks:,} idle chats {which}; one comes back as a copy "
        f"of {format_bytes(blocks * size)}."
    )
