"""Copies to host memory and back, on vLLM's real block manager.

Whatever a query sees must hold its own tokens, wherever it was computed, copied to and
read from (``tests/helpers/host_world.py``).
"""

import random
from collections import Counter

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from tests.helpers.block_managers import make_manager
from tests.helpers.host_world import MAX_LEN, WORLDS, World
from vllm_sink.cache.host.store import HostStore
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start.host_cache import chat_blocks


def live(world, seed: int) -> Counter:
    """Chats that go on, are edited, preempted and pushed out; what happened."""
    rng = random.Random(seed)
    sim = World(*world, rng)
    chats = [rng.choices(range(50), k=rng.randrange(20, 90)) for _ in range(3)]
    for _ in range(250):
        if len(sim.waiting) + len(sim.running) + len(sim.loading) < 4:
            chat = rng.randrange(len(chats))
            if len(chats[chat]) > MAX_LEN - 80:
                chats[chat] = chats[chat][: rng.randrange(20, 90)]
            sim.add(list(chats[chat]))
        sim.step(may_fail=seed == 3)
        sim.check_account()
        for request in list(sim.running):
            long = request.num_tokens > MAX_LEN - 10
            likely = 0.5 if request in sim.late else 0.08
            if long or (request.num_output_tokens and rng.random() < likely):
                sim.finish(request)
                kept = list(request.all_token_ids)
                if rng.random() < 0.3:  # another answer, to the same prompt
                    kept = kept[: request.num_prompt_tokens]
                kept += rng.choices(range(50), k=rng.randrange(1, 30))
                chats[rng.randrange(len(chats))] = kept
    for _ in range(600):  # and everything ends
        if not sim.waiting + sim.running + sim.loading:
            break
        sim.step(may_fail=False)
        for request in [r for r in sim.running if r.num_output_tokens]:
            sim.finish(request)
    assert not sim.waiting + sim.running + sim.loading
    sim.host.take_copies({})
    for request in sim.ending:
        sim.manager.free(request)
    assert sim.pool.get_num_free_blocks() == sim.num_free
    assert sim.host.store.entries and sim.manager.reset_prefix_cache()
    sim.host.take_copies({})
    assert not sim.host.store.num_used, "other weights, say: none of it is true"
    return sim.tally


def test_every_query_sees_its_own_tokens():
    total: Counter = Counter()
    for world in WORLDS:
        tally = sum((live(world, seed) for seed in range(4)), Counter())
        print(world, dict(tally))
        total += tally
    for what in ("hits", "loads behind a hit", "loads of preempted", "late saves"):
        assert total[what], what
    assert total["failed loads"]


def served(policy, chunks) -> tuple[World, Request]:
    """A request whose prompt was computed, and what the last chunk's step copied."""
    sim = World([policy], 16, 50, random.Random(0))
    sim.add(list(range(sum(chunks))))
    (request,) = sim.waiting
    for count in chunks:
        assert sim.manager.allocate_slots(request, count)
        copies = sim.host.take_copies({request.request_id: count})
        sim.compute(request, count)
    for block, slot, serial in copies.saves:
        sim.slots[slot] = serial, sim.contents[block]
    return sim, request


def matched(sim: World, tokens) -> int:
    """Tokens that the host alone has of a prompt."""
    sim.add(tokens)
    return sim.host.match(sim.waiting[-1], 0)


@pytest.mark.parametrize("policy", [(4, 20), (0, 2), (20, 33)])
def test_a_prompt_of_whole_blocks_that_is_sent_anew_comes_back(policy):
    """Its last token is computed anew, and so is the block that it is in."""
    sim, request = served(policy, [24, 24, 24, 24])
    assert matched(sim, list(request.prompt_token_ids)) == 80
    assert matched(sim, [*request.prompt_token_ids, 1]) == 96


def test_a_block_that_has_just_left_the_window_is_copied_from_where_it_lies():
    sim, request = served((0, 2), [24, 7, 1])
    assert matched(sim, list(request.prompt_token_ids)) == 16


def test_a_prompt_in_chunks_is_copied_when_it_is_whole():
    sim, _ = served((4, 20), [24, 24, 24, 24])
    assert len(sim.host.store.turns) == 1
    indices = {len(content) // 16 - 1 for _, (_, content) in sim.slots.values()}
    assert indices == {0, 3, 4, 5}, "sinks and window, and a block before it; no gap"


@pytest.mark.parametrize("sizes", [[16, 16], [16, 8]])
def test_the_start_line_counts_what_a_chat_takes(sizes):
    """Blocks of several sizes, too: a hit ends where one of each does."""
    sim = World([(4, 20), 21], sizes, 50, random.Random(0))
    sim.add(list(range(96)))
    (request,) = sim.waiting
    for count in [24] * 4:
        assert sim.manager.allocate_slots(request, count)
        sim.host.take_copies({request.request_id: count})
        sim.compute(request, count)
    (turn,) = sim.host.store.turns.values()
    assert len(turn.entries) == chat_blocks(sim.manager.kv_cache_config, 96)


def test_a_match_that_vllm_cuts_short_fails():
    sim, request = served((4, 20), [24, 24, 24])
    found = matched(sim, [*request.prompt_token_ids, 1])
    other = sim.waiting[-1]
    blocks = sim.manager.get_blocks(request.request_id)
    sim.host.start_load(other, blocks, found - 16)
    (((slot, serial, _),),) = sim.host.take_copies({}).loads.values()
    assert (slot, serial) == (-1, -1), "what no slot holds"
    sim.host.end_loads([other.request_id], [other.request_id])
    assert sim.host.match(other, 0) == 0


def test_turns_leave_whole_and_share_blocks():
    store = HostStore(4)
    for name, keys in {"a": "sx", "b": "sy"}.items():
        store.open_turn(name)
        for key in keys:
            assert store.add(name, key)
    store.open_turn("c")
    assert store.add("c", "z") and store.num_used == 4
    assert store.add("c", "w")  # the turn that is oldest makes way
    assert set(store.entries) == {"s", "y", "z", "w"}
    assert store.add("c", "v") and store.add("c", "u")  # and the next, with the sink
    assert set(store.entries) == {"z", "w", "v", "u"}
    assert store.add("c", "t") is None


def test_a_block_that_a_load_reads_keeps_its_slot():
    store = HostStore(1)
    store.open_turn("a")
    entry = store.add("a", "x")
    store.hold(entry)
    store.open_turn("b")
    assert store.add("b", "y") is None
    store.release(entry)
    assert store.add("b", "y").slot == entry.slot
    assert store.get("x") is None


def test_an_earlier_turn_of_a_chat_goes_before_other_chats():
    store = HostStore(3)
    for name in "abc":
        store.open_turn(name)
        store.add(name, name)
        store.set_end(name, name)
    store.demote_earlier(["q", "b"])
    store.open_turn("d")
    store.add("d", "d")
    assert set(store.entries) == {"a", "c", "d"}


def pool_of_eight(num_tokens: int) -> tuple:
    """A manager of 8 blocks of 16 tokens, and a request of so many."""
    manager = make_manager(
        RetentionPolicy(4, 60), 16, 9, max_model_len=10_000, max_in_flight_tokens=16
    )
    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256)
    params = SamplingParams(max_tokens=9)
    return manager, Request("a", [1] * num_tokens, params, None, block_hasher=hasher)


def test_a_row_that_came_from_elsewhere_is_charged_for_what_it_may_hold():
    """Admission of a long prompt behind it, in a pool of few blocks: no wait."""
    manager, request = pool_of_eight(5000)
    computed = 2000
    assert manager.allocate_slots(
        request, 0, num_external_computed_tokens=computed, delay_cache_blocks=True
    )
    row = manager.get_blocks("a").blocks[0]
    held = [index for index, block in enumerate(row) if not block.is_null]
    assert held == [0, 121, 122, 123, 124]
    request.num_computed_tokens = computed
    assert manager.allocate_slots(request, 16, full_sequence_must_fit=True)


def test_a_sessions_next_turn_may_be_longer_than_the_pool():
    manager, request = pool_of_eight(16)
    assert manager.allocate_slots(request, 16)
    request.num_computed_tokens = 16
    request.append_output_token_ids([2] * 5000)  # as vLLM appends a turn
    assert manager.allocate_slots(request, 16, full_sequence_must_fit=True)
