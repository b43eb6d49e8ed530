"""Prompts sent again hit as many tokens as under stock, with vLLM's defaults and room.

vLLM's real ``KVCacheManager`` beside the same under full attention, prompt by prompt.
"""

from __future__ import annotations

import random

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from tests.helpers.block_managers import full_spec, manager_of_specs, sink_spec
from vllm_sink.policy.layout import RetentionPolicy

BLOCK = 128
CHUNK = 512


def text(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


def manager_of(kind: str, policy: tuple[int, int], **config) -> KVCacheManager:
    """With a pool that nothing fills."""
    sink = sink_spec(RetentionPolicy(*policy), BLOCK)
    windowed = sink_spec(RetentionPolicy(policy[0], 2 * policy[1]), BLOCK)
    full = full_spec(BLOCK)
    specs = {
        "stock": [full],
        "plain": [sink],
        "heads": [sink, full],
        "heads, windowed": [sink, windowed],
    }[kind]
    return manager_of_specs(
        specs,
        num_blocks=4000,
        max_model_len=100_000,
        max_in_flight_tokens=2 * CHUNK,
        **config,
    )


class Server:
    """Serves prompts one after another; answers what it is told to."""

    def __init__(self, manager: KVCacheManager, chunk: int = CHUNK) -> None:
        self.manager = manager
        self.chunk = chunk
        init_none_hash(sha256)
        size = manager.block_pool.hash_block_size
        self.hasher = get_request_block_hasher(size, sha256)
        self.served = 0

    def serve(self, prompt: list[int], answer: list[int]) -> int:
        """Tokens found in the cache."""
        self.served += 1
        request = Request(
            str(self.served),
            prompt,
            SamplingParams(max_tokens=len(answer) + 1),
            None,
            block_hasher=self.hasher,
        )
        blocks, hit, boundary = self.manager.get_computed_blocks(request)
        request.shared_prefix_boundary = boundary
        while request.num_computed_tokens < len(prompt):
            start = request.num_computed_tokens or hit
            count = min(self.chunk, len(prompt) - start)
            is_first = request.num_computed_tokens == 0
            assert self.manager.allocate_slots(
                request,
                count,
                num_new_computed_tokens=hit if is_first else 0,
                new_computed_blocks=blocks if is_first else None,
            )
            request.num_computed_tokens = start + count
        for token in answer:
            request.append_output_token_ids(token)
            assert self.manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1
        self.manager.free(request)
        return hit


def shared_start(kind: str, policy: tuple[int, int], **config) -> list[int]:
    """Four prompts that share 1,500 of 1,800 tokens."""
    server = Server(manager_of(kind, policy, **config))
    prompts = [text(0, 1500) + text(i, 300) for i in range(1, 5)]
    return [server.serve(prompt, text(9, 20)) for prompt in prompts][1:]


def changed_end(kind: str, policy: tuple[int, int], **config) -> list[int]:
    """A prompt of 4,100 tokens, then with other last ten."""
    server = Server(manager_of(kind, policy, **config))
    prompt = text(0, 4100)
    server.serve(prompt, text(9, 200))
    return [server.serve(prompt[:-10] + text(1, 10), [])]


def seven_turns(kind: str, policy: tuple[int, int], **config) -> list[int]:
    """A chat of 2,540 tokens: each turn sends all that was said."""
    server = Server(manager_of(kind, policy, **config))
    ends = [(400, 540), (900, 1030), (1130, 1260), (1700, 1800), (1950, 2060)]
    ends += [(2200, 2450), (2500, 2540)]
    said = text(0, 2540)
    hits = [server.serve(said[:asked], said[asked:ended]) for asked, ended in ends]
    return hits[1:]


CASES = [
    (shared_start, (4, 252), [1408, 1408, 1408]),
    (shared_start, (4, 1020), [1408, 1408, 1408]),
    (changed_end, (4, 1020), [3968]),
    (seven_turns, (4, 252), [512, 1024, 1152, 1792, 2048, 2432]),
    (seven_turns, (4, 4092), [512, 1024, 1152, 1792, 2048, 2432]),
]


@pytest.mark.parametrize("kind", ["stock", "plain", "heads", "heads, windowed"])
@pytest.mark.parametrize("case, policy, hits", CASES)
def test_with_room_a_prompt_hits_what_stock_would(kind, case, policy, hits):
    """0 is vLLM's default interval, None its dense one: the same here."""
    for interval in (0, None):
        config = dict(prefix_cache_retention_interval=interval)
        assert case(kind, policy, **config) == hits, f"interval {interval}"


@pytest.mark.parametrize("kind", ["stock", "plain", "heads", "heads, windowed"])
def test_a_prompt_of_whole_blocks_leaves_a_token_to_compute(kind):
    """All of it is cached, and its last token's logits still have to be computed."""
    server = Server(manager_of(kind, (4, 252)))
    prompt = text(1, 6 * BLOCK)
    assert [server.serve(prompt, text(2, 5)) for _ in range(2)] == [0, 5 * BLOCK]
