"""The start line: words and numbers, and what a bare flag means."""

import pytest

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start.log_lines import start_line


def line(policy: RetentionPolicy, max_model_len: int, **changes) -> str:
    settings = dict(sink_positions="cache", block_size=128, block_bytes=2**20)
    settings["max_blocks"] = policy.max_blocks(1, max_model_len, 128)
    return start_line(
        policy, max_model_len=max_model_len, pool_blocks=100, **settings | changes
    )


@pytest.mark.parametrize(
    "policy, max_model_len, words",
    [
        (
            SinkConfig().policy,
            131_072,
            "each token sees the first 4 and the last 4,092 tokens; a request takes at "
            "most 34.0 MiB of a worker's KV cache instead of 1.0 GiB, so 2 requests of "
            "any length fit the pool of 100 blocks of 128 tokens (sink_positions=",
        ),
        (
            SinkConfig().policy,
            4096,
            "full attention, because max_model_len 4,096 is within the 4 + 4,092 "
            "tokens that each token sees; a request takes at most 32.0 MiB of a "
            "worker's KV cache, as without the policy",
        ),
        (RetentionPolicy(0, 256), 8192, "each token sees the last 256 tokens; a"),
    ],
)
def test_words(policy, max_model_len, words):
    assert f"Sink policy: {words}" in line(policy, max_model_len)


def test_one_token_more_than_the_budget_is_no_full_attention():
    assert "each token sees" in line(SinkConfig().policy, 4097)


def test_blocks_where_their_bytes_are_unknown():
    text = line(RetentionPolicy(4, 252), 8192, block_bytes=0)
    assert "a request takes at most 4 blocks instead of 64, so 25 requests" in text


def test_a_prefill_holds_more_than_what_decodes():
    text = line(RetentionPolicy(4, 252), 8192, max_blocks=20)
    assert "at most 20.0 MiB of a worker's KV cache (4.0 MiB while it decodes)" in text
