"""A scheduler of few rules over vLLM's real block manager and the host's memory.

No model: a block's content is the tokens that it was computed from.
"""

import dataclasses
import math
import random
from collections import Counter

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from tests.helpers.block_managers import full_spec, manager_of_specs, sink_spec
from vllm_sink.cache.host.scheduler import HostScheduler
from vllm_sink.cache.spec import OwnWindowSpec
from vllm_sink.policy.layout import RetentionPolicy

FIELDS = dataclasses.fields(SlidingWindowSpec)
CHUNK = 24
MAX_LEN = 300
FULL = None
# The policy of each group (None keeps everything, W alone is a layer's own window),
# the block size or one for each (slots beside windows), slots of the host.
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
    ([(4, 60), FULL, 33], [16, 16, 8], 200),
    ([33, (17, 40)], [16, 8], 120),
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

    def __init__(
        self, policies, size: int | list[int], num_slots: int, rng: random.Random
    ):
        self.sizes = [size] * len(policies) if isinstance(size, int) else size
        self.unit = math.lcm(*self.sizes)  # of a hit
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(math.gcd(*self.sizes), sha256)
        pairs = [(0, each) if isinstance(each, int) else each for each in policies]
        self.policies = [pair and RetentionPolicy(*pair) for pair in pairs]
        self.rng = rng
        most = sum(
            -(-MAX_LEN // size)
            if policy is None
            else policy.max_blocks(CHUNK, MAX_LEN, size)
            for policy, size in zip(self.policies, self.sizes, strict=True)
        )
        self.manager = manager_of_specs(
            list(map(spec_of, policies, self.sizes)),
            2 * most + 1,
            max_model_len=MAX_LEN,
            max_in_flight_tokens=CHUNK,
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
            and (request.num_computed_tokens + 1) % self.unit == 0
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
        for group, (policy, size, row) in enumerate(
            zip(self.policies, self.sizes, self.rows(request), strict=True)
        ):
            gap = policy.gap_blocks(start, size) if policy else (0, 0)
            for index in range(-(-end // size)):
                if gap[0] <= index < gap[1]:
                    continue
                first, last = index * size, min((index + 1) * size, end)
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
