"""The policy in words: what a token sees and what a request costs."""

from __future__ import annotations

from vllm_sink.policy.layout import RetentionPolicy, cdiv


def format_bytes(size: float) -> str:
    """``size`` in bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def sight(policy: RetentionPolicy, max_model_len: int) -> str:
    """What a token sees, as a clause."""
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
    """What a request takes, as a clause.

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
    """What the log says of one group of layers at start.

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
