"""Memory that very long streams take on a GPU beside the KV cache.

vLLM keeps arrays of ``max_num_seqs`` rows whose length follows ``max_model_len``,
whatever attention retains: the tokens of every request, and block tables. At a
million tokens and the default of 1,024 requests they take gigabytes.
"""

from __future__ import annotations

from vllm.config import VllmConfig

MAX_BLOCK_SIZE = 128
MAX_TABLE_ENTRIES = 8192  # of a request: 131,072 tokens in vLLM's blocks of 16
WARN_ABOVE = 1 << 30
_INT32 = 4


def preferred_block_size(default: int, max_model_len: int) -> int:
    """Tokens a block: the default, doubled until block tables are short enough.

    A block table has an entry for each block of ``max_model_len`` and is copied for
    every request in every step. Larger blocks free the gap later: of the window's
    last block, up to a block less one token is kept in vain.
    """
    size = default
    while size < MAX_BLOCK_SIZE and max_model_len > size * MAX_TABLE_ENTRIES:
        size *= 2
    return size


def long_stream_bytes(
    max_model_len: int, max_num_seqs: int, block_size: int, num_groups: int
) -> tuple[int, int]:
    """Bytes of pinned host memory and of the device, under vLLM's model runner V2.

    V2 keeps [max_num_seqs, max_model_len] token ids on the host and two block tables
    a KV cache group on the device; V1 has the same sizes, in other places.
    """
    rows = max_num_seqs * _INT32
    blocks = -(-max_model_len // block_size)
    return rows * max_model_len, 2 * num_groups * rows * blocks


def long_stream_warning(vllm_config: VllmConfig, num_groups: int = 1) -> str | None:
    """Warning that ``max_model_len`` times ``max_num_seqs`` is dear, or None."""
    max_model_len = vllm_config.model_config.max_model_len
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    block_size = vllm_config.cache_config.block_size
    host, device = long_stream_bytes(
        max_model_len, max_num_seqs, block_size, num_groups
    )
    if host + device <= WARN_ABOVE:
        return None
    gib = 1 << 30
    fitting = max(1, max_num_seqs * WARN_ABOVE // (host + device))
    return (
        f"max_model_len {max_model_len:,} with max_num_seqs {max_num_seqs:,} takes "
        f"{host / gib:.1f} GiB of pinned host memory for token ids and "
        f"{device / gib:.2f} GiB of GPU memory for block tables of {block_size}-token "
        f"blocks, beside the KV cache; --max-num-seqs {fitting} brings both to about "
        "1 GiB"
    )
