"""Prompts sent again hit as many tokens as under stock, with vLLM's defaults and room.

vLLM's real ``KVCacheManager`` beside the same under full attention, prompt by prompt.
"""

from __future__ import annotations

import random

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import (
    MambaManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import Request

from tests.helpers.block_managers import full_spec, manager_of_specs, sink_spec
from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.cache.spec import OwnWindowSpec
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start.groups import settle_order

BLOCK = 128
CHUNK = 512


def text(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


def manager_of(kind: str, policy: tuple[int, int], **config) -> KVCacheManager:
    """With a pool that nothing fills."""
    sink = sink_spec(RetentionPolicy(*policy), BLOCK)
    windowed = sink_spec(RetentionPolicy(policy[0], 2 * policy[1]), BLOCK)
    full = full_spec(BLOCK)
    own = OwnWindowSpec(
        block_size=BLOCK,
        num_kv_heads=1,
        head_size=16,
        dtype=torch.float32,
        sliding_window=4 * BLOCK,
    )
    state = MambaSpec(
        block_size=BLOCK,
        shapes=((16,),),
        dtypes=(torch.float32,),
        mamba_cache_mode="align",  # a state at the end of a chunk, if blocks end there
    )
    specs = {
        "stock": [full],
        "plain": [sink],
        "heads": [sink, full],
        "heads, windowed": [sink, windowed],
        "stock, window first": [own, full],
        "window first": [own, sink],
        "heads, window first": [own, sink, full],
        "stock, state first": [state, full],
        "state first": [state, sink],
    }[kind]
    manager = manager_of_specs(
        specs,
        num_blocks=4000,
        max_model_len=100_000,
        max_in_flight_tokens=2 * CHUNK,
        **config,
    )
    settle_order(manager.coordinator)  # as every start does
    return manager


class Server:
    """Serves prompts one after another; answers what it is told to."""

    def __init__(self, manager: KVCacheManager, chunk: int = CHUNK) -> None:
        self.manager = manager
        self.chunk = chunk
        init_none_hash(sha256)
        self.block_size = manager.block_pool.hash_block_size
        self.hasher = get_request_block_hasher(self.block_size, sha256)
        managers = manager.coordinator.single_type_managers
        self.has_states = any(isinstance(each, MambaManager) for each in managers)
        self.served = 0

    def serve(self, prompt: list[int], answer: list[int]) -> int:
        """Tokens found in the cache."""
        self.served += 1
        self.manager.new_step_starts()
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
            stops = [start + self.chunk, len(prompt)]
            if self.has_states:  # vLLM's scheduler ends chunks where they are kept
                last = (len(prompt) - 1) // self.block_size * self.block_size
                stops += [boundary, last]
            count = min(stop for stop in stops if stop > start) - start
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


@pytest.mark.parametrize("boundary", [3 * BLOCK, 20 * BLOCK + 5, 40 * BLOCK])
def test_an_interval_longer_than_any_request_is_what_vllm_means_by_0(boundary):
    """A given 0 can't be told from vLLM's default, which means something else here."""
    spec = sink_spec(RetentionPolicy(4, 252), BLOCK)

    def kept(manager: type, interval: int) -> list[bool]:
        arguments = (0, 40, BLOCK, spec, False, interval, [boundary])
        mask = manager.reachable_block_mask(*arguments)
        assert mask is not None
        return mask

    ends = kept(SlidingWindowManager, 0)
    assert 0 < sum(ends) < 40
    assert kept(SinkManager, 1000 * BLOCK) == [True, *ends[1:]]


FIRST = ["window first", "heads, window first", "state first"]


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("case, policy", [(case, policy) for case, policy, _ in CASES])
def test_behind_layers_of_another_kind_a_prompt_hits_what_stock_would(
    kind, case, policy
):
    """Layers that keep ends of prompts alone: stock learns what prompts share."""
    stock = "stock, " + kind.split(", ")[-1]
    assert case(kind, policy) == case(stock, policy)
    if case is shared_start:
        assert case(kind, policy) == [0, 1408, 1408]


@pytest.mark.parametrize("kind", ["stock", "plain", "heads", "heads, windowed"])
def test_a_prompt_of_whole_blocks_leaves_a_token_to_compute(kind):
    """All of it is cached, and its last token's logits still have to be computed."""
    server = Server(manager_of(kind, (4, 252)))
    prompt = text(1, 6 * BLOCK)
    assert [server.serve(prompt, text(2, 5)) for _ in range(2)] == [0, 5 * BLOCK]
