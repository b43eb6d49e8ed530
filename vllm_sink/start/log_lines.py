"""Log lines of an engine's start: its policy, and the memory of a request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_sink.engine import Engine
from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.grouping import RequestMemory, heads_held
from vllm_sink.policy.layout import RetentionPolicy, cdiv

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_sink.cache.block_manager import SinkManager
    from vllm_sink.policy.slots import SlotMemory

logger = logging.getLogger("vllm.plugins.sink")


def log_policy(vllm_config: VllmConfig, managers: list[Any]) -> None:
    """Log a line for each group of layers, in the engine core.

    Args:
        managers: The block managers of the engine's groups.
    """
    for line in policy_lines(vllm_config, managers):
        logger.info("%s", line)


def policy_lines(vllm_config: VllmConfig, managers: list[Any]) -> list[str]:
    """A line for each group of layers; none where heads of two kinds share the pool.

    There no group's figures tell how many requests fit: see :func:`retrieval_line`.
    """
    config = Engine.of(vllm_config).config
    if config.head_map is not None and not config.head_map.is_uniform:
        return []
    max_model_len = vllm_config.model_config.max_model_len
    return [
        _policy_line(manager, config.sink_positions, max_model_len)
        for manager in managers
        if hasattr(manager, "policy")
    ]


def _policy_line(manager: SinkManager, sink_positions: str, max_model_len: int) -> str:
    spec, most = manager.kv_cache_spec, manager.max_admission_blocks_per_request
    assert most is not None, "vLLM caps every subclass of SlidingWindowSpec"
    return start_line(
        manager.policy,
        sink_positions=sink_positions,
        max_model_len=max_model_len,
        max_blocks=most,
        pool_blocks=manager.block_pool.num_gpu_blocks - 1,  # less the null block
        block_size=manager.block_size,
        block_bytes=spec.num_layers * spec.page_size_bytes,
    )


def start_line(
    policy: RetentionPolicy,
    *,
    sink_positions: str,
    max_model_len: int,
    max_blocks: int,
    pool_blocks: int,
    block_size: int,
    block_bytes: int,
) -> str:
    """The line for one group of layers.

    Args:
        max_blocks: Most blocks that a request holds, prefill included.
        pool_blocks: Blocks that requests share.
        block_bytes: As for :func:`cost`.
    """
    return (
        f"Sink policy: {sight(policy, max_model_len)}; "
        f"{cost(policy, max_blocks, max_model_len, block_size, block_bytes)}, so "
        f"{pool_blocks // max_blocks:,} requests of any length fit the pool of "
        f"{pool_blocks:,} blocks of {block_size} tokens (sink_positions="
        f"{sink_positions})."
    )


def log_retrieval_heads(engine: Engine, spec: AttentionSpec) -> None:
    """Log the line of retrieval heads, and the warning if one is due.

    Args:
        spec: Of any group: the groups' pages are equal.
    """
    vllm_config, config = engine.vllm_config, engine.config
    line = retrieval_line(vllm_config, config, spec.page_size_bytes)
    if line is None:
        return
    from vllm_sink.rotation.exact import trained_length

    trained = trained_length(engine)
    max_model_len = vllm_config.model_config.max_model_len
    logger.info("%s", line)
    if config.retrieval_policy is None and 0 < trained < max_model_len:
        logger.warning(
            "max_model_len %d is beyond the trained length %d, and retrieval heads "
            "see true distances; set sink.retrieval_window_size to at most %d to "
            "keep them within it.",
            max_model_len,
            trained,
            trained - config.num_sink_tokens,
        )


def retrieval_line(
    vllm_config: VllmConfig, config: SinkConfig, page_bytes: int
) -> str | None:
    """The line for retrieval heads; None without any."""
    heads = config.head_map
    if heads is None or not heads.num_retrieval_heads:
        return None
    max_model_len = vllm_config.model_config.max_model_len
    what = "everything"
    if config.retrieval_policy is not None:
        what = f"{config.num_sink_tokens} + {config.retrieval_window_size} tokens"
    line = (
        f"Retrieval heads: {heads.num_retrieval_heads} of {heads.num_heads} KV heads "
        f"keep {what}"
    )
    if not heads.is_uniform:
        slots = find_slot_memory(vllm_config)
        memory = slots or request_memory(vllm_config, config, page_bytes)
        lengths = sorted({n for n in (4096, 32768) if n < max_model_len})
        sizes = [
            f"{memory.bytes(n) / 2**20:.1f} MiB at {n:,} tokens "
            f"(dense {memory.dense_bytes(n) / 2**20:.1f})"
            for n in [*lengths, max_model_len]
        ]
        line += (
            f", the others {config.num_sink_tokens} + {config.window_size}; a request "
            f"holds {', '.join(sizes)} on this worker, in "
            f"{memory.grouping.num_groups} groups"
        )
        if slots is not None:
            line += blocks_clause(slots, max_model_len)
    return line + "."


def find_slot_memory(vllm_config: VllmConfig) -> SlotMemory | None:
    """A request's memory on a worker whose pool other layers share; else None."""
    from vllm_sink.cache.slot_groups import SlotGroups

    groups = Engine.of(vllm_config).head_groups
    if not isinstance(groups, SlotGroups):
        return None
    return groups.plan(vllm_config)


def blocks_clause(memory: SlotMemory, max_model_len: int) -> str:
    """What blocks that other layers make large come to, as a clause."""
    held = memory.streaming.max_blocks(1, max_model_len, memory.block_size)
    ratio = memory.bytes(max_model_len) / memory.kept_bytes(max_model_len)
    return (
        f" with those of the other layers, in blocks of {memory.block_size} tokens: a "
        f"streaming head holds {held * memory.block_size:,} tokens, and all blocks "
        f"{ratio:.2f} times what is kept at {max_model_len:,}"
    )


def request_memory(
    vllm_config: VllmConfig, config: SinkConfig, page_bytes: int
) -> RequestMemory:
    """A request's memory on one worker.

    Args:
        page_bytes: A block of one head, or of a whole layer where none is split.
    """
    from vllm_sink.cache.workers import workers_of

    assert config.head_map is not None
    parallel = vllm_config.parallel_config
    workers = workers_of(vllm_config, config.head_map)
    num_ranks = parallel.tensor_parallel_size
    stage = parallel.rank // num_ranks % parallel.pipeline_parallel_size
    held = heads_held(config.head_map, num_ranks, parallel.rank % num_ranks)
    return RequestMemory(
        grouping=workers.grouping,
        num_heads=sum(workers.counts[stage, held]),
        head_bytes=page_bytes,
        block_size=vllm_config.cache_config.block_size,
        streaming=config.policy,
        retrieval=config.retrieval_policy,
    )


def format_bytes(size: float) -> str:
    """``size`` in bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def sight(policy: RetentionPolicy, max_model_len: int) -> str:
    """The tokens that a token sees, as a clause."""
    sinks, window = policy.num_sink_tokens, policy.window_size
    if policy.budget >= max_model_len:
        return (
            f"full attention, because max_model_len {max_model_len:,} is within the "
            f"{sinks:,} + {window:,} tokens that each token sees"
        )
    first = f"the first {sinks:,} and " if sinks else ""
    return f"each token sees {first}the last {window:,} tokens"


def cost(
    policy: RetentionPolicy,
    max_blocks: int,
    max_model_len: int,
    block_size: int,
    block_bytes: int,
) -> str:
    """The memory that a request takes, as a clause.

    Args:
        max_blocks: Most blocks that a request holds, prefill included.
        block_bytes: Bytes of a block in all layers under the policy, on one worker;
            0 where nobody knows: the figures are blocks then.
    """

    def size(blocks: int) -> str:
        return format_bytes(blocks * block_bytes) if block_bytes else f"{blocks:,}"

    dense = cdiv(max_model_len, block_size)
    decoding = policy.max_blocks(1, max_model_len, block_size)
    unit = "of a worker's KV cache" if block_bytes else "blocks"
    most = f"a request takes at most {size(max_blocks)} {unit}"
    if decoding >= dense:
        return f"{most}, as without the policy"
    if decoding < max_blocks:
        most += f" ({size(decoding)} while it decodes)"
    return f"{most} instead of {size(dense)}"
