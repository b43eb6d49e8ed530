"""What the start says of retrieval heads: how many, and what a request holds."""

from __future__ import annotations

import weakref

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.grouping import RequestMemory, choose_grouping, heads_of_workers

logger = init_logger("vllm.plugins.sink")

_told_of: weakref.ref[VllmConfig] | None = None  # it holds the whole model


def tell_once(
    vllm_config: VllmConfig, config: SinkConfig, spec: AttentionSpec, trained: int
) -> None:
    """Log the line, and the warning if one is due; once an engine and worker.

    Args:
        spec: Of any group: the groups' pages are equal.
        trained: The model's trained length, tokens; 0 if unknown.
    """
    global _told_of
    is_known = _told_of is not None and _told_of() is vllm_config
    line = retrieval_line(vllm_config, config, spec.page_size_bytes)
    if line is None or is_known:
        return
    _told_of = weakref.ref(vllm_config)
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
    """What the start says of the heads; None where none is a retrieval head."""
    max_model_len = vllm_config.model_config.max_model_len
    config = config.clipped(max_model_len)
    heads = config.head_map
    if heads is None or not heads.num_retrieval_heads:
        return None
    what = "everything"
    if config.retrieval_policy is not None:
        what = f"{config.num_sink_tokens} + {config.retrieval_window_size} tokens"
    line = (
        f"Retrieval heads: {heads.num_retrieval_heads} of {heads.num_heads} KV heads "
        f"keep {what}"
    )
    if not heads.is_uniform:
        memory = request_memory(vllm_config, config, page_bytes)
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
    return line + "."


def request_memory(
    vllm_config: VllmConfig, config: SinkConfig, page_bytes: int
) -> RequestMemory:
    """Of one worker; ``page_bytes``: a block of one head, or of a whole layer."""
    assert config.head_map is not None
    parallel = vllm_config.parallel_config
    held, counts = heads_of_workers(
        config.head_map, parallel.tensor_parallel_size, parallel.rank
    )
    return RequestMemory(
        grouping=choose_grouping(counts.values()),
        num_heads=sum(counts[held]),
        head_bytes=page_bytes,
        block_size=vllm_config.cache_config.block_size,
        streaming=config.policy,
        retrieval=config.retrieval_policy,
    )
