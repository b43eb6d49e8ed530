"""Single properties of the block manager; all of them meet in the machine."""

import os
from dataclasses import replace
from inspect import signature
from itertools import combinations
from types import SimpleNamespace

import pytest
import vllm
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.request import Request

from tests.helpers.block_managers import make_manager, sink_spec
from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.policy.layout import RetentionPolicy, cdiv


def test_vllm_is_the_one_that_was_asked_for():
    """scripts/test.sh runs this file on two versions."""
    expected = os.environ.get("VLLM_SINK_EXPECT_VLLM", vllm.__version__)
    assert vllm.__version__.split("+")[0] == expected.split("+")[0]


def test_gap_is_what_no_later_query_sees():
    for sinks, window, size in [(0, 1, 1), (4, 60, 16), (5, 7, 3), (130, 126, 32)]:
        policy = RetentionPolicy(sinks, window)
        for n in range(0, 600, 7):
            first, last = policy.gap_blocks(n, size)
            assert policy.num_sink_blocks(size) == first <= last
            unseen = [
                block
                for block in range(cdiv(n, size))
                if not any(
                    policy.sees(n, token)
                    for token in range(block * size, min((block + 1) * size, n + 1))
                )
            ]
            assert list(range(first, last)) == unseen


def test_a_request_in_its_first_block_needs_no_second():
    """Nothing of it is cached yet, so vLLM's usual mark of a running request is off."""
    manager = make_manager(
        RetentionPolicy(16, 32), 16, 2, max_model_len=64, max_in_flight_tokens=16
    )
    request = Request("a", [1] * 5, SamplingParams(max_tokens=9), None)
    assert manager.allocate_slots(request, 5)
    request.num_computed_tokens = 5
    request.append_output_token_ids(2)
    assert manager.block_pool.get_num_free_blocks() == 0
    assert manager.allocate_slots(request, 1) is not None


def test_sinks_outlive_their_tails_in_the_cache():
    """Under pressure the tail of a cached prefix goes first: no orphan tails."""
    policy, size = RetentionPolicy(16, 32), 16
    manager = make_manager(policy, size, 12, max_model_len=400, max_in_flight_tokens=24)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(size, sha256)
    pool = manager.block_pool

    def finish(name, tokens):
        request = Request(
            name, tokens, SamplingParams(max_tokens=9), None, block_hasher=hasher
        )
        for start in range(0, len(tokens), size):
            assert manager.allocate_slots(request, min(size, len(tokens) - start))
            request.num_computed_tokens = min(start + size, len(tokens))
        manager.free(request)
        return request

    first = finish("a", list(range(100)))
    for pressure in range(1, 12):
        taken = pool.get_new_blocks(pressure)
        cached = [
            pool.get_cached_block(block_hash, [0]) is not None
            for block_hash in first.block_hashes
        ]
        assert cached[0] or not any(cached), "a tail without its sink"
        pool.free_blocks(taken)


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("policy", [(4, 60), (16, 32), (20, 1), (0, 33), (40, 17)])
def test_longest_hit_whatever_is_cached(policy, dropped):
    """Also where a drafter drops a hit's last block: the rest is a hit by itself."""
    size, count = 16, 8
    spec = sink_spec(RetentionPolicy(*policy), size)

    def wanted(end: int) -> list[int]:
        """Blocks that a hit of ``end`` of them needs, the dropped one included."""
        n = (end - dropped) * size
        tokens = [range(i * size, (i + 1) * size) for i in range(end)]
        return [
            i
            for i, block in enumerate(tokens)
            if block[0] < policy[0] or block[-1] > n - policy[1]
        ]

    for bits in range(1 << count):
        cached = {i for i in range(count) if bits >> i & 1}
        pool = SimpleNamespace(
            hash_block_size=size,
            null_block=None,
            get_cached_block=lambda i, _, cached=cached: [i] if i in cached else None,
        )
        (hit,), length = SinkManager.find_longest_cache_hit(
            list(range(count)),
            count * size,
            kv_cache_group_ids=[0],
            block_pool=pool,
            kv_cache_spec=spec,
            drop_eagle_block=bool(dropped),
            alignment_tokens=size,
        )
        ends = [end for end in range(1, count + 1) if cached >= set(wanted(end))]
        assert length == max(max(ends, default=0) - dropped, 0) * size, cached
        first, last = spec.policy.gap_blocks(length, size)
        assert hit == [None if first <= i < last else i for i in range(len(hit))]
        assert len(hit) * size == length


def late_hashes(hasher, lookahead: int):
    """A block's hash once ``lookahead`` tokens behind it exist, as vLLM 0.33 has it."""

    def hashes(request):
        new = hasher(request)
        known = max(request.num_tokens - lookahead, 0) // 16
        return new[: max(known - len(request.block_hashes), 0)]

    return hashes


@pytest.mark.parametrize("lookahead", [2, 20])
def test_a_hit_ends_with_the_hashes(lookahead):
    """With EAGLE or MTP drafts there are fewer hashes than whole blocks to look up."""
    policy, size = RetentionPolicy(16, 32), 16
    manager = make_manager(
        policy, size, 40, max_model_len=400, max_in_flight_tokens=400
    )
    init_none_hash(sha256)
    hasher = get_request_block_hasher(size, sha256)
    params = SamplingParams(max_tokens=9)
    first = Request("a", list(range(200)), params, None, block_hasher=hasher)
    assert manager.allocate_slots(first, 200)
    late = late_hashes(hasher, lookahead)
    again = Request("b", list(range(97)), params, None, block_hasher=late)
    assert len(again.block_hashes) < 96 // size
    _, hit, _ = manager.get_computed_blocks(again)
    assert hit == len(again.block_hashes) * size


@pytest.mark.skipif(
    "num_hash_lookahead_tokens" not in signature(get_request_block_hasher).parameters,
    reason="hashes of this vLLM cover their blocks alone",
)
def test_hits_with_a_hash_lookahead_of_vllm():
    policy, size = RetentionPolicy(16, 32), 16
    manager = make_manager(
        policy, size, 40, max_model_len=400, max_in_flight_tokens=400
    )
    init_none_hash(sha256)
    hasher = get_request_block_hasher(size, sha256, num_hash_lookahead_tokens=3)
    params = SamplingParams(max_tokens=9)
    for name, hit in ("a", 0), ("b", 80):
        request = Request(name, list(range(97)), params, None, block_hasher=hasher)
        blocks, found, _ = manager.get_computed_blocks(request)
        assert found == hit
        assert manager.allocate_slots(
            request, 97 - hit, num_new_computed_tokens=hit, new_computed_blocks=blocks
        )
        request.num_computed_tokens = 97


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("policy", [(4, 60), (16, 32), (20, 1), (0, 33), (40, 17)])
def test_what_a_retry_needs_is_what_a_hit_needs(policy, drops):
    """A drafter's hit needs one block more, and drops it."""
    size = 16
    manager = make_manager(
        RetentionPolicy(*policy), size, 40, max_model_len=400, max_in_flight_tokens=16
    ).coordinator.single_type_managers[0]
    manager.use_eagle = drops
    sinks = cdiv(policy[0], size)
    for tokens in range(0, 330, 7):
        n = tokens // size * size
        needed = [
            index
            for index in range(sinks, 22)
            if index * size < n + drops * size
            and (index + 1) * size > n - policy[1] + 1
        ]
        found = [i for i in range(sinks, 22) if manager._serves_hit(i, tokens)]
        assert found == needed, tokens


def test_blocks_to_cache_are_all_or_a_given_intervals_and_the_sinks():
    """0 is vLLM's default; in any chunk."""
    spec = sink_spec(RetentionPolicy(40, 20), 16)
    for start, end in combinations(range(12), 2):
        for interval in (0, None):
            asked = start, end, 16, spec, False, interval
            assert SinkManager.reachable_block_mask(*asked) is None
        asked = start, end, 16, spec, False, 64
        window = SlidingWindowManager.reachable_block_mask(*asked)
        mask = SinkManager.reachable_block_mask(*asked)
        assert mask == [x or start + i < 3 for i, x in enumerate(window)]


def test_retrieval_heads_with_a_window_have_a_gauge_of_their_own():
    policies = RetentionPolicy(4, 20), RetentionPolicy(4, 200)
    windowed = replace(sink_spec(policies[1], 16), is_retrieval=True)
    manager = make_manager(
        policies[0],
        16,
        40,
        max_model_len=400,
        max_in_flight_tokens=16,
        other_specs=[windowed],
    )
    gauges = [one.gauge for one in manager.coordinator.single_type_managers]
    assert gauges == ["vllm:sink_live_blocks", "vllm:sink_retrieval_blocks"]
