"""A state machine that drives vLLM's real KVCacheManager under the sink spec.

Hypothesis chooses what happens (add, extend, hit, draft tokens, steps in
flight, preempt, resume, abort, finish, reset); ``tests/helpers/retention_oracle.py``
says what must be true after each step.
"""

import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_group_id,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.request import Request

from tests.helpers.block_managers import full_spec, make_manager, sink_spec
from tests.helpers.retention_oracle import NULL, Oracle, Sequence, Worth
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.start.groups import settle_order

CHUNK = 24  # most tokens a step; two steps may be in flight
MAX_LEN = 300
FULL = (0, 10**6)  # a group of retrieval heads that keep everything
# (S, W) of each group, and the block size. Several groups are heads of two policies.
POLICIES = [
    (((4, 60),), 16),
    (((0, 33),), 16),
    (((20, 1),), 8),
    (((40, 24),), 16),
    (((3, 5),), 1),
    (((17, 40),), 8),
    (((4, 60), (4, 60), FULL), 16),
    (((0, 33), FULL), 16),
    (((17, 40), (17, 40), (17, 120)), 8),
    (((20, 1), FULL), 8),
]
ROOTS = [random.Random(seed).choices(range(50), k=MAX_LEN) for seed in range(3)]
ROOT_SEQUENCES = [Sequence(root) for root in ROOTS]  # with their names, once
STEPS = settings(
    max_examples=110,
    stateful_step_count=100,
    derandomize=True,  # the same steps everywhere
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a failure is reported unshrunk, at once
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class Life:
    """A request and the oracle's view of it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sequence = Sequence(list(request.all_token_ids))
        self.slots = 0  # tokens that have had a slot, rejected drafts included
        self.in_flight = 0  # of those, what wasn't processed at the last step
        self.num_final = 0  # tokens computed at the last step, drafts excepted
        self.alone = False  # nothing else took a block since it was admitted
        self.num_admitted = 0  # tokens that admission knew of
        self.resumed_at = 0  # tokens of the hit
        self.retries: set[int] = set()  # ids of its gap's blocks that a retry would hit


class BlockManagerMachine(RuleBasedStateMachine):
    counts: ClassVar[Counter] = Counter()  # what happened, over all runs

    @initialize(
        policy=st.sampled_from(POLICIES),
        times=st.sampled_from([1, 1, 2]),
        is_settled=st.booleans(),
    )
    def start(self, policy, times, is_settled):
        groups, self.size = policy
        self.oracles = [Oracle(sinks, window, self.size) for sinks, window in groups]
        self.bounds = [
            min(oracle.bound(2 * CHUNK), oracle.blocks(MAX_LEN))
            for oracle in self.oracles
        ]
        self.counts["several groups"] += len(groups) > 1
        self.manager = make_manager(
            RetentionPolicy(*groups[0]),
            self.size,
            num_blocks=times * sum(self.bounds) + 1,
            max_model_len=MAX_LEN,
            max_in_flight_tokens=2 * CHUNK,
            other_specs=[
                full_spec(self.size)
                if group == FULL
                else sink_spec(RetentionPolicy(*group), self.size)
                for group in groups[1:]
            ],
        )
        if is_settled:  # as a start does
            settle_order(self.manager.coordinator)
        self.weighs_tails = is_settled and len(groups) == 1
        self.pool = self.manager.block_pool
        self.tally: Counter = Counter()  # what /metrics would show
        for manager in self.manager.coordinator.single_type_managers:
            manager.metrics = SimpleNamespace(add=self.add_metric)
        self.num_usable = self.pool.get_num_free_blocks()
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(self.size, sha256)
        self.running: list[Life] = []
        self.waiting: list[Life] = []
        # cached block id -> (group, prefix's name)
        self.cached: dict[int, tuple[int, int]] = {}
        self.worth = Worth()
        self.names = 0

    def add_metric(self, name: str, amount: int) -> None:
        self.tally[name.removeprefix("vllm:sink_")] += amount

    # -- what the pool and the rows look like --------------------------------

    def rows(self, life: Life) -> list[tuple[Oracle, list[int]]]:
        """Of every group, its oracle and the request's row of block ids."""
        rows = self.manager.get_block_ids(life.request.request_id)
        return list(zip(self.oracles, map(list, rows), strict=True))

    def live(self, life: Life) -> list[int]:
        """Ids of all blocks that the request holds."""
        return [i for _, row in self.rows(life) for i in row if i != NULL]

    def cached_ids(self) -> list[set[int]]:
        """Of every group, the ids of its blocks in the prefix cache."""
        ids: list[set[int]] = [set() for _ in self.oracles]
        for block in self.pool.blocks:
            if block.block_hash is not None:
                ids[get_group_id(block.block_hash)].add(block.block_id)
        return ids

    def cached_names(self) -> list[set[int]]:
        ids = self.cached_ids()
        return [o.cached_prefixes(i) for o, i in zip(self.oracles, ids, strict=True)]

    def longest_hit(self, life: Life) -> int:
        """Most tokens that are a hit in every group."""
        names = self.cached_names()
        limit = (life.request.num_tokens - 1) // self.size
        for count in range(limit, 0, -1):
            n = count * self.size
            if all(
                oracle.is_hit(life.sequence, n, cached)
                for oracle, cached in zip(self.oracles, names, strict=True)
            ):
                return n
        return 0

    def must_hold(self, processed: int, required: int) -> list[int]:
        """Of every group, how many blocks a request holds."""
        return [len(o.must_hold(processed, required)) for o in self.oracles]

    def free(self) -> int:
        return self.pool.get_num_free_blocks()

    def processed(self, life: Life) -> int:
        return life.request.num_computed_tokens - life.request.num_in_flight_tokens

    # -- steps ---------------------------------------------------------------

    def write(self, life: Life, start: int, count: int) -> None:
        taken: set[int] = set()
        before = dict(self.cached)
        for oracle, row in self.rows(life):
            taken |= set(row[start // self.size :])
            oracle.write(row, start, start + count, life.sequence)
        for block_id, (group, name) in before.items():
            # Only a new owner takes a block out of the prefix cache.
            if block_id not in taken:
                assert self.pool.blocks[block_id].block_hash is not None
                assert self.oracles[group].prefix_of(block_id) == name
        for other in self.running:
            other.alone = other.alone and other is life

    def allocate(self, life: Life, count: int, hit: int = 0, **admission):
        """vLLM's ``allocate_slots``; what it reuses must be worth least."""
        request = life.request
        before = [row for _, row in self.rows(life)]
        cached = {b.block_id for b in self.pool.blocks if b.block_hash is not None}
        cached -= {i for row in before for i in row}
        hits = set(self.live_ids(admission.get("new_computed_blocks")))
        allocated = self.manager.allocate_slots(
            request, count, num_new_computed_tokens=hit, **admission
        )
        prompt = request.num_prompt_tokens
        taken: set[int] = set()
        for old, (oracle, row) in zip(before, self.rows(life), strict=True):
            gone = [i for i, block_id in enumerate(old) if row[i] != block_id]
            for index in gone:
                block = self.pool.blocks[old[index]]
                serves = oracle.serves_retry(index, life.resumed_at, prompt)
                if block.ref_cnt == 0 and block.block_hash is not None:
                    self.worth.free(block.block_id, "retry" if serves else "gap")
                    life.retries |= {block.block_id} if serves else set()
                elif block.ref_cnt == 0:
                    self.worth.forget({block.block_id})
            taken |= set(row) - set(old) - {NULL}
        if allocated is not None:
            self.worth.take_up(hits)
            taken -= hits
        free = {b.block_id for b in self.pool.free_block_queue.get_all_free_blocks()}
        blank = {i for i in free if self.pool.blocks[i].block_hash is None}
        reused = taken & cached
        self.counts["reused gap"] += any(
            self.worth.kinds.get(i) == "gap" for i in reused
        )
        self.counts["reused tail"] += any(
            self.worth.kinds.get(i) == "tail" for i in reused
        )
        self.worth.check(reused, free, blank)
        self.worth.forget(taken)
        return allocated

    def live_ids(self, blocks) -> list[int]:
        rows = blocks.get_block_ids() if blocks is not None else ()
        return [i for row in rows for i in row if i != NULL]

    def give_up(self, life: Life) -> None:
        """A request's end, or its preemption: its blocks are a turn's tail."""
        rows = [row for _, row in self.rows(life)]
        self.manager.free(life.request)
        for row in rows:
            rounds = 0
            if self.weighs_tails and row:
                times = len(row) / sum(block_id != NULL for block_id in row)
                rounds = int(math.log2(times))
                self.counts["long tails"] += rounds > 0
            for block_id in reversed(row):
                block = self.pool.blocks[block_id]
                if block_id != NULL and block.ref_cnt == 0:
                    if block.block_hash is None:
                        self.worth.forget({block_id})
                    else:
                        self.worth.free(block_id, "tail", rounds)
        for block_id in life.retries:  # gap, if the chat goes on
            if self.worth.kinds.get(block_id) == "retry":
                del self.worth.kinds[block_id]
        life.retries = set()

    def admit(self, life: Life) -> bool:
        """Look up a hit and admit, as the scheduler does; False if it must wait."""
        request = life.request
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        assert hit == self.longest_hit(life)
        shared = 0
        for oracle, ids in zip(self.oracles, blocks.get_block_ids(), strict=True):
            oracle.check_hit(ids, hit, life.sequence)
            # Hit blocks that nobody holds leave the free queue too.
            shared += sum(i != NULL and self.pool.blocks[i].ref_cnt > 0 for i in ids)
        count = min(CHUNK, request.num_tokens - hit)
        free = self.free()
        life.resumed_at = hit
        admitted = self.allocate(
            life, count, hit, new_computed_blocks=blocks, full_sequence_must_fit=True
        )
        whole = sum(map(min, self.must_hold(hit, request.num_tokens), self.bounds))
        if admitted is None:
            self.counts["refused"] += 1
            assert whole - shared > free, "it would have fitted"
            assert self.free() == free, "a refusal must not take blocks"
            return False
        assert whole - shared <= free, "it may run out of blocks alone"
        assert sum(self.must_hold(hit, hit + count)) - shared == free - self.free()
        self.counts["hits"] += hit > 0
        self.counts["hit tokens"] += hit
        request.num_computed_tokens = hit + count
        self.write(life, hit, count)
        life.slots, life.in_flight = hit + count, count
        life.num_final = hit + count
        # Blocks of a hit that others hold leave its window and free nothing.
        life.alone = shared == 0
        life.num_admitted = request.num_tokens
        self.running.append(life)
        return True

    def preempt(self, life: Life) -> None:
        self.give_up(life)
        life.request.num_computed_tokens = life.request.num_in_flight_tokens = 0
        self.running.remove(life)
        self.waiting.append(life)
        self.counts["preemptions"] += 1

    def advance(self, life: Life, count: int, in_flight: bool) -> bool:
        """One step of ``count`` tokens; preempts when the pool can't give them."""
        request = life.request
        start, processed = request.num_computed_tokens, self.processed(life)
        held = [set(row) - {NULL} for _, row in self.rows(life)]
        allocated = self.allocate(life, count)
        if allocated is None:
            slots = max(life.slots, start + count)
            wanted = sum(self.must_hold(processed, slots)) - len(self.live(life))
            assert wanted > self.free(), "the pool had the blocks"
            # What it generates, drafts included, admission doesn't know of.
            was_seen = life.alone and slots <= life.num_admitted
            assert not was_seen, "admission could have seen that"
            self.counts["out of blocks"] += 1
            self.preempt(life)
            return False
        for (oracle, row), before in zip(self.rows(life), held, strict=True):
            for index in range(len(row)):
                if oracle.in_gap(index, processed):
                    assert row[index] == NULL, "the gap must be freed at once"
            assert before >= set(row[: start // self.size]) - {NULL}
        self.write(life, start, count)
        life.slots = max(life.slots, start + count)
        life.in_flight = life.slots - processed
        life.num_final = min(start + count, request.num_tokens)
        request.num_computed_tokens = start + count
        # The step before is processed now; this one may still be under way.
        request.num_in_flight_tokens = count if in_flight else 0
        return True

    # -- rules ---------------------------------------------------------------

    @precondition(lambda self: len(self.running) + len(self.waiting) < 6)
    @rule(
        root=st.integers(0, len(ROOTS) - 1),
        shared=st.sampled_from([0, 0, 10, 50, 100, 150, 200, 240]),
        own=st.lists(st.integers(0, 49), min_size=1, max_size=40),
    )
    def add(self, root, shared, own):
        self.names += 1
        request = Request(
            str(self.names),
            ROOTS[root][:shared] + own,
            SamplingParams(max_tokens=MAX_LEN),
            None,
            block_hasher=self.hasher,
        )
        life = Life(request)
        if not self.admit(life):
            self.waiting.append(life)

    @precondition(lambda self: self.waiting)
    @rule(pick=st.integers(0, 5))
    def admit_waiting(self, pick):
        life = self.waiting[pick % len(self.waiting)]
        self.waiting.remove(life)
        resumed = life.request.num_output_tokens > 0
        if self.admit(life):
            self.counts["resumed with output"] += resumed
        else:
            self.waiting.append(life)

    def decode(self, life: Life, in_flight: bool) -> bool:
        """The next chunk of what is known; past the end, a token is sampled."""
        request = life.request
        if request.num_tokens >= MAX_LEN - 1:
            return False
        if request.num_computed_tokens == request.num_tokens:
            self.sample(life, [request.num_tokens % 50])
        left = request.num_tokens - request.num_computed_tokens
        return self.advance(life, min(CHUNK, left), in_flight)

    def sample(self, life: Life, tokens: list[int]) -> None:
        known = life.request.num_tokens
        life.request.append_output_token_ids(tokens)
        life.sequence.replace_from(known, tokens)

    @precondition(lambda self: self.running)
    @rule(rounds=st.integers(1, 20), in_flight=st.booleans())
    def extend(self, rounds, in_flight):
        """Batches of all running requests, which compete for the pool."""
        for _ in range(rounds):
            for life in list(self.running):
                if self.decode(life, in_flight):
                    self.counts["extended in flight" if in_flight else "extended"] += 1
                    self.everything_adds_up()

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 5))
    def run_prompt_to_its_end(self, pick):
        """What admission promised: alone, a prompt never fails half way."""
        life = self.running[pick % len(self.running)]
        request = life.request
        while request.num_computed_tokens < request.num_tokens:
            if not self.decode(life, in_flight=False):
                break
            self.everything_adds_up()

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 5), drafts=st.integers(1, 7), accepted=st.integers(0, 7))
    def speculate(self, pick, drafts, accepted):
        """A step with draft tokens, of which the first ``accepted`` stay."""
        life = self.running[pick % len(self.running)]
        request = life.request
        if request.num_tokens + drafts + 1 >= MAX_LEN:
            return
        request.num_in_flight_tokens = 0  # the step before is processed
        if request.num_computed_tokens == request.num_tokens:
            self.sample(life, [6])
        known = request.num_tokens
        if request.num_computed_tokens != known - 1:
            return
        accepted = min(accepted, drafts)
        life.sequence.tokens.extend([7] * drafts)
        if not self.advance(life, 1 + drafts, in_flight=False):
            life.sequence.replace_from(known, [])
            return
        request.num_computed_tokens = known + accepted
        self.sample(life, [7] * accepted + [8])
        self.counts["drafts rejected"] += drafts - accepted

    @precondition(lambda self: self.running or self.waiting)
    @rule(pick=st.integers(0, 11), preempt=st.booleans())
    def preempt_finish_or_abort(self, pick, preempt):
        lives = self.running + self.waiting
        life = lives[pick % len(lives)]
        if life in self.waiting:
            self.waiting.remove(life)
        elif preempt:
            self.preempt(life)
        else:
            self.running.remove(life)
            self.give_up(life)

    @precondition(lambda self: self.cached and not self.running)
    @rule()
    def reset(self):
        assert self.manager.reset_prefix_cache()
        assert not any(self.cached_ids())
        self.cached = {}
        self.worth = Worth()
        self.counts["resets"] += 1

    # -- invariants ----------------------------------------------------------

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "oracles"):
            return
        self.counts["steps"] += 1
        held: Counter = Counter()
        for life in self.running:
            computed = life.request.num_computed_tokens
            live = self.live(life)
            assert len(live) == len(set(live)), "a block twice in a request's rows"
            held.update(live)
            for oracle, row in self.rows(life):
                own = sum(i != NULL for i in row)
                assert own <= oracle.bound(life.in_flight), "above the bound"
                for query in {self.processed(life), computed}:
                    oracle.check_visible(row, query, life.sequence)
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id], "reference count"
        queue = [b.block_id for b in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(queue) == len(set(queue)) == self.free()
        assert set(queue).isdisjoint(held), "a live block can be taken"
        assert len(queue) + len(held) == self.num_usable, "a block was lost"
        counted: dict[str, set[int]] = {"live_blocks": set(), "retrieval_blocks": set()}
        pinned: set[int] = set()
        for life in self.running:
            for oracle, row in self.rows(life):
                is_full = (oracle.num_sinks, oracle.window) == FULL
                kind = "retrieval_blocks" if is_full else "live_blocks"
                counted[kind] |= set(row) - {NULL}
                pinned |= set(row[: oracle.blocks(oracle.num_sinks)])
        for kind, ids in counted.items():
            assert self.tally[kind] == len(ids), kind
        assert self.tally["pinned_blocks"] == len(pinned)
        self.check_cache()

    def check_cache(self) -> None:
        """Every full block is cached, and no tail without its sinks."""
        cached_ids, cached_names = self.cached_ids(), self.cached_names()
        self.cached = {
            i: (group, oracle.prefix_of(i))
            for group, oracle in enumerate(self.oracles)
            for i in cached_ids[group]
        }
        for life in self.running:
            for group, (oracle, row) in enumerate(self.rows(life)):
                for index, block_id in enumerate(row[: life.num_final // self.size]):
                    if block_id != NULL and oracle.serves_a_hit(index):
                        assert block_id in cached_ids[group], "full, and not cached"
        for prefixes in self.families():
            for oracle, names in zip(self.oracles, cached_names, strict=True):
                tails = [i for i, name in enumerate(prefixes) if name in names]
                sinks = range(oracle.blocks(oracle.num_sinks))
                if tails and tails[-1] >= len(sinks):
                    for index in sinks:
                        assert prefixes[index] in names, "a tail without its sinks"

    def families(self):
        """Block prefixes of every request seen lately, and of the roots."""
        size = self.size
        for sequence in ROOT_SEQUENCES + [
            life.sequence for life in self.running + self.waiting
        ]:
            count = len(sequence.tokens) // size
            yield [sequence.name((i + 1) * size - 1) for i in range(count)]

    def teardown(self):
        if not hasattr(self, "oracles"):
            return
        for life in self.running:
            self.manager.free(life.request)
        assert self.free() == self.num_usable
        assert self.manager.reset_prefix_cache()
