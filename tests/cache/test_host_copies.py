"""Copies to host memory and back, on vLLM's real block manager.

No model: a block's content is the tokens that it was computed from. Whatever a query
sees must hold its own tokens, wherever it was computed, copied to and read from.
"""

import dataclasses
import random
from collections import Counter

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from tests.helpers.block_managers import full_spec, make_manager, sink_spec
from vllm_sink.cache.host.scheduler import HostScheduler
from vllm_sink.cache.host.store import HostStore
from vllm_sink.cache.spec import OwnWindowSpec
from vllm_sink.policy.layout import RetentionPolicy

FIELDS = dataclasses.fields(SlidingWindowSpec)
CHUNK = 24
MAX_LEN = 300
FULL = None
# The policy of each group (None keeps everything, W alone is a layer's own window),
# the block size, slots of the host.
WORLDS = [
    ([(4, 60)], 16, 60),
    ([(0, 33)], 16, 40),
    ([(20, 1)], 8, 40),
    ([(40, 24)], 16, 13),
    ([(17, 40)], 8, 200),
    ([(4, 60), (4, 60), FULL], 16, 200),
    ([(17, 40), (17, 120)], 8, 90),
    ([(20, 1), FULL], 8, 120),
    ([(4, 60), 33], 16, 120),
]


def spec_of(policy, size: int):
    if policy is FULL:
        return full_spec(size)
    if isinstance(policy, int):
        spec = sink_spec(RetentionPolicy(0, policy), size)
        fields = {field.name: getattr(spec, field.name) for field in FIELDS}
        return OwnWindowSpec(**fields)
    return sink_spec(RetentionPolicy(*policy), size)


class World:
    """A scheduler of few rules, a pool and a host whose blocks hold tokens."""

    def __init__(self, policies, size: int, num_slots: int, rng: random.Random):
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(size, sha256)
        pairs = [(0, each) if isinstance(each, int) else each for each in policies]
        self.policies = [pair and RetentionPolicy(*pair) for pair in pairs]
        self.size = size
        self.rng = rng
        most = sum(
            -(-MAX_LEN // size)
            if policy is None
            else policy.max_blocks(CHUNK, MAX_LEN, size)
            for policy in self.policies
        )
        self.manager = make_manager(
            self.policies[0],
            size,
            2 * most + 1,
            max_model_len=MAX_LEN,
            max_in_flight_tokens=CHUNK,
            other_specs=[spec_of(policy, size) for policy in policies[1:]],
        )
        self.pool = self.manager.block_pool
        self.num_free = self.pool.get_num_free_blocks()
        self.host = HostScheduler(num_slots, 1)
        self.host.bind(self.manager)
        self.tally: Counter = Counter()
        self.host._count = self.count
        self.contents: dict[int, tuple] = {}  # of the pool's blocks
        self.slots: dict[int, tuple] = {}  # serial and content
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.loading: list[Request] = []
        self.ending: list[Request] = []
        self.failed: list[Request] = []
        self.names = 0

    def count(self, name, amount):
        self.tally[name] += amount

    def rows(self, request):
        return [
            [block.block_id if not block.is_null else None for block in row]
            for row in self.manager.get_blocks(request.request_id).blocks
        ]

    def add(self, tokens) -> None:
        self.names += 1
        request = Request(
            f"r{self.names}",
            tokens,
            SamplingParams(max_tokens=MAX_LEN),
            None,
            block_hasher=self.hasher,
        )
        self.host.add_request(request)
        self.waiting.append(request)

    def admit(self) -> None:
        request = self.waiting[0]
        hit, num_hit, _ = self.manager.get_computed_blocks(request)
        found = self.host.match(request, num_hit)
        assert not (found and request in self.failed), "a load that failed once"
        count = 0 if found else min(CHUNK, request.num_tokens - num_hit)
        given = self.manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=hit,
            num_external_computed_tokens=found,
            delay_cache_blocks=bool(found),
            full_sequence_must_fit=True,
        )
        if given is None:
            return
        self.waiting.pop(0)
        self.host.start_load(
            request, self.manager.get_blocks(request.request_id), found
        )
        request.num_computed_tokens = num_hit + found
        if found:
            self.loading.append(request)
            self.tally["loads of preempted"] += request.num_preemptions > 0
            self.tally["loads behind a hit"] += num_hit > 0
        else:
            self.running.append(request)
            self.scheduled[request.request_id] = count

    def step(self, may_fail: bool) -> None:
        self.scheduled: dict[str, int] = {}
        for request in list(self.running):
            if request not in self.running:
                continue
            count = min(CHUNK, request.num_tokens - request.num_computed_tokens)
            while self.manager.allocate_slots(request, count) is None:
                victim = self.running[-1]
                self.preempt(victim)
                if victim is request:
                    break
            else:
                self.scheduled[request.request_id] = count
        if self.waiting and not self.preempted:
            self.admit()
        self.preempted = False
        told = dict(self.scheduled)
        self.late = [
            request
            for request in self.running
            if request.num_output_tokens
            and (request.num_computed_tokens + 1) % self.size == 0
            and self.rng.random() < 0.3
        ]
        for request in self.late:
            told.pop(request.request_id, None)  # the block's last token isn't known
        copies = self.host.take_copies(told)
        for request in self.running:
            self.compute(request, self.scheduled.get(request.request_id, 0))
        ended, failed = self.load(copies, may_fail)
        taken = [slot for _, slot, _ in copies.saves]
        assert len(taken) == len(set(taken)), "a slot is filled once a step"
        for block, slot, serial in copies.saves:
            self.slots[slot] = serial, self.contents[block]
        for request in [r for r in self.ending if r.request_id in copies.ended]:
            self.ending.remove(request)
            self.manager.free(request)
        self.host.end_loads(ended, failed)
        for request in [r for r in self.loading if r.request_id in ended]:
            self.loading.remove(request)
            if request.request_id in failed:
                self.manager.free(request)
                request.num_computed_tokens = 0
                self.waiting.insert(0, request)
                self.failed.append(request)
                lost = {slot for slot, _, _ in copies.loads[request.request_id]}
                kept = {entry.slot for entry in self.host.store.entries.values()}
                assert not lost & kept, "what failed can be found"
            else:
                self.manager.cache_blocks(request, request.num_computed_tokens)
                self.running.append(request)
                if request.num_computed_tokens == request.num_tokens:
                    request.num_computed_tokens -= 1

    preempted = False

    def preempt(self, request) -> None:
        self.preempted = True
        self.running.remove(request)
        self.scheduled.pop(request.request_id, None)
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.insert(0, request)

    def load(self, copies, may_fail):
        ended, failed = set(), set()
        for name, wanted in copies.loads.items():
            ended.add(name)
            for slot, serial, block in wanted:
                filled, content = self.slots[slot]
                assert filled == serial, "a slot holds another copy"
                self.contents[block] = content
            if may_fail and self.rng.random() < 0.3:
                failed.add(name)
                self.tally["failed loads"] += 1
        return ended, failed

    def compute(self, request, count: int) -> None:
        """Compute tokens, once what they see is found to be theirs."""
        if not count:
            return
        start = request.num_computed_tokens
        end = start + count
        tokens = list(request.all_token_ids)
        for group, (policy, row) in enumerate(
            zip(self.policies, self.rows(request), strict=True)
        ):
            gap = policy.gap_blocks(start, self.size) if policy else (0, 0)
            for index in range(-(-end // self.size)):
                if gap[0] <= index < gap[1]:
                    continue
                first, last = index * self.size, min((index + 1) * self.size, end)
                if first < start:
                    seen = group, tuple(tokens[: min(last, start)])
                    assert self.contents[row[index]] == seen, (request, group, index)
                if last > start:
                    self.contents[row[index]] = group, tuple(tokens[:last])
        request.num_computed_tokens = end
        if end == request.num_tokens:
            request.append_output_token_ids(self.rng.randrange(50))

    def finish(self, request) -> None:
        self.running.remove(request)
        self.manager.remove_skipped_blocks(
            request.request_id, request.num_computed_tokens, request.num_prompt_tokens
        )
        if self.host.end_request(request):
            self.tally["late saves"] += 1
            self.ending.append(request)
        else:
            self.manager.free(request)

    def check_account(self) -> None:
        store = self.host.store
        held = Counter(
            id(entry)
            for turn in store.turns.values()
            for entry in turn.entries.values()
        )
        for _, entries in self.host._loading.values():
            held.update(id(entry) for entry in entries)
        used = {entry.slot for entry in store.entries.values()}
        assert len(used) == len(store.entries) <= store.num_slots
        assert store.num_used >= len(used)
        for entry in store.entries.values():
            assert entry.holders == held[id(entry)] > 0


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
