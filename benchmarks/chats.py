"""Chats that come back: a day of 500 chats on vLLM's real KV cache manager, no model.

    python -m benchmarks.chats [--pools 1 2 4 8 16 32 50] [--engines stock sink …]

Every turn sends the whole history anew, as an OpenAI client does; most chats are idle
most of the time. What a turn computes although it was computed before is the price of
what the pool has lost. The pool is that of an 8B model of Llama 3.1's shape (128 KiB a
token in bfloat16), blocks of 16 tokens, S + W = 4 + 4,092. Chats, messages and think
times come from seeds: the same in every run.

``stock`` is full attention: a turn that doesn't fit its pool is refused, and left out
of its mean. ``retention 0`` is the policy with vLLM's default retention interval and
vLLM's own order of free blocks, ``lru`` caches every block in that order, ``sink`` is
the policy as it is. ``optimum`` never loses anything. ``foresight`` is the bound of
:mod:`benchmarks.chats_bound`.

Writes benchmarks/results/chats.csv; ``python -m benchmarks.plot`` draws it.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
import vllm
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request

from benchmarks import common
from vllm_sink.cache.block_manager import SinkManager
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.plugin import compat
from vllm_sink.policy.config import SinkConfig
from vllm_sink.start.groups import settle_order

ENGINES = ("stock", "retention 0", "lru", "sink", "foresight")
COLUMNS = (
    *("engine", "pool_gib", "chats", "turns", "refused", "preemptions"),
    *("prompt", "new", "again", "optimum"),
    *("turns_paired", "new_paired", "again_paired", "optimum_paired"),
)
POOLS = (1, 2, 4, 8, 16, 32, 50)  # GiB
BLOCK_SIZE = 16
BLOCK_BYTES = BLOCK_SIZE * 128 * 1024
CHUNK = 2048  # tokens a step; one step is in flight
MAX_MODEL_LEN = 131_072
NUM_SINK_TOKENS, WINDOW_SIZE = 4, 4092

CHATS = 500
DAY = 24 * 3600.0  # seconds
SYSTEM_PROMPTS = (200, 300, 450, 700, 1000, 1400, 1900, 2500, 3200, 4000)
MEAN_TURNS = 20
PREFILL_RATE, DECODE_RATE = 10_000, 40  # tokens a second, of all and of one request
STRIDE = 64  # tokens decoded between two events of a request


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def think_time(rng: random.Random) -> float:
    """Seconds to minutes mostly, hours now and then."""
    low, high = rng.choices([(5, 120), (120, 1800), (1800, 6 * 3600)], (70, 24, 6))[0]
    return log_uniform(rng, low, high)


@dataclass
class Turn:
    """One request of a chat.

    Args:
        prompt, answer: Tokens.
        known: Of the prompt's tokens, those that were computed before, by whomever.
        hashes: Of its full blocks, the answer's too.
    """

    chat: Chat
    index: int
    prompt: int
    answer: int
    known: int
    hashes: list[bytes]
    computed: int = 0
    request: Request | None = None
    admitted: int = 0

    @property
    def blocks(self) -> int:
        """Of a pool that keeps all of it."""
        return -(-(self.prompt + self.answer) // BLOCK_SIZE)


@dataclass
class Chat:
    """What one user sends. Its draws don't depend on when it is served."""

    number: int
    seen_prompts: set[int]  # system prompts that some chat has sent
    length: int = 0  # tokens said so far
    hashes: list[bytes] = field(default_factory=list)
    spans: tuple[int, int, int] = (0, 0, 0)  # last message's start, end; answer's end

    def __post_init__(self) -> None:
        self.rng = random.Random(self.number)
        self.starts_at = self.rng.triangular(0, DAY)
        self.turns = 1 + int(self.rng.expovariate(1 / (MEAN_TURNS - 1)))
        self.names = (f"{self.number}.{i}".encode() for i in count())

    def say(self, tokens: int) -> None:
        """Tokens that nobody else has said."""
        self.length += tokens
        while len(self.hashes) < self.length // BLOCK_SIZE:
            self.hashes.append(next(self.names))

    def go_back(self, length: int) -> None:
        self.length = length
        del self.hashes[length // BLOCK_SIZE :]

    def next_turns(self) -> Iterator[Turn]:
        rng = self.rng
        system = rng.randrange(len(SYSTEM_PROMPTS))
        self.length = SYSTEM_PROMPTS[system]
        full = self.length // BLOCK_SIZE
        self.hashes = [f"system{system}.{i}".encode() for i in range(full)]
        for index in range(self.turns):
            start, asked, _ = self.spans
            kind = rng.random()
            if index == 0:
                known = self.length if system in self.seen_prompts else 0
                self.seen_prompts.add(system)
            elif kind < 0.05:  # the last message, edited
                self.go_back(start)
                known = self.length
            elif kind < 0.10:  # another answer, please
                self.go_back(asked)
                known = self.length
            else:
                known = self.length
            start = self.length if not 0.05 <= kind < 0.10 or not index else start
            if index == 0 or not 0.05 <= kind < 0.10:
                message = log_uniform(rng, 20, 1500)
                if rng.random() < 0.015:
                    message = log_uniform(rng, 10_000, 100_000)  # a document
                self.say(int(message))
            prompt, answer = self.length, int(log_uniform(rng, 20, 1500))
            if prompt + answer >= MAX_MODEL_LEN:
                return
            self.say(answer)
            self.spans = start, prompt, self.length
            yield Turn(self, index, prompt, answer, known, list(self.hashes))


class AnyOrder:
    """vLLM's own order of free blocks."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def sink_mask(start_block: int, end_block: int, **rest) -> list[bool] | None:
    """What vLLM's default retention interval caches, and the sinks."""
    mask = SlidingWindowManager.reachable_block_mask(start_block, end_block, **rest)
    assert mask is not None
    return [kept or start_block + i < 1 for i, kept in enumerate(mask)]


def make_manager(engine: str, pool_gib: float) -> KVCacheManager:
    compat.register_kv_cache_spec()
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=8, head_size=128, dtype=torch.bfloat16
    )
    if engine != "stock":
        spec = SinkSpec.from_full(spec, SinkConfig(NUM_SINK_TOKENS, WINDOW_SIZE))
    manager = KVCacheManager(
        KVCacheConfig(
            num_blocks=int(pool_gib * 2**30) // BLOCK_BYTES + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            prefix_cache_retention_interval=0,
        ),
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        max_in_flight_tokens=CHUNK,
    )
    blocks = manager.coordinator.single_type_managers[0]
    settle_order(manager.coordinator)
    if engine in ("retention 0", "lru"):
        assert isinstance(blocks, SinkManager)
        blocks.order = AnyOrder()
    if engine == "retention 0":
        blocks.reachable_block_mask = sink_mask
    return manager


class Day:
    """One engine serves the day."""

    def __init__(self, engine: str, pool_gib: float, chats: int) -> None:
        self.manager = make_manager(engine, pool_gib)
        self.num_blocks = self.manager.block_pool.get_num_free_blocks()
        self.bounded = engine != "stock"
        self.events: list[tuple[float, int, Turn]] = []
        self.serial = count()
        self.waiting: deque[Turn] = deque()
        self.running: list[Turn] = []
        self.served: dict[tuple[int, int], Turn] = {}
        self.refused = self.preemptions = 0
        self.turns: dict[int, Iterator[Turn]] = {}
        self.now = 0.0
        seen: set[int] = set()
        for number in range(chats):
            chat = Chat(number, seen)
            self.turns[number] = chat.next_turns()
            # The first turn is drawn when it comes: what is known depends on it.
            self.post(chat.starts_at, chat)

    def post(self, when: float, what) -> None:
        heapq.heappush(self.events, (when, next(self.serial), what))

    def run(self) -> None:
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            if isinstance(what, Chat):
                self.arrive(what)
            elif what[1] == what[0].admitted:  # not preempted since
                self.decode(what[0])
        assert not self.waiting and not self.running

    def arrive(self, chat: Chat) -> None:
        turn = next(self.turns[chat.number], None)
        if turn is None:
            return
        if not self.bounded and turn.blocks > self.num_blocks:
            self.refused += 1
            self.post(self.now + think_time(chat.rng), chat)
            return
        self.waiting.append(turn)
        self.admit()

    def admit(self) -> None:
        while self.waiting and self.start(self.waiting[0]):
            self.waiting.popleft()

    def start(self, turn: Turn) -> bool:
        """A hit, then the prefill, a chunk at a time."""
        if turn.request is None:
            turn.request = Request(
                f"{turn.chat.number}.{turn.index}",
                [0] * turn.prompt,
                SamplingParams(max_tokens=turn.answer + 1),
                None,
                block_hasher=lambda request: turn.hashes[
                    len(request.block_hashes) : request.num_tokens // BLOCK_SIZE
                ],
            )
        request = turn.request
        blocks, hit, boundary = self.manager.get_computed_blocks(request)
        request.shared_prefix_boundary = boundary
        done = hit
        while done < request.num_tokens:
            count = min(CHUNK, request.num_tokens - done)
            is_first = done == hit
            allocated = self.manager.allocate_slots(
                request,
                count,
                num_new_computed_tokens=hit if is_first else 0,
                new_computed_blocks=blocks if is_first else None,
                full_sequence_must_fit=is_first,
            )
            if allocated is None:
                if not is_first:  # computed for nothing
                    self.release(turn)
                assert self.running, "alone, it must fit"
                return False
            done += count
            turn.computed += count
            request.num_computed_tokens = done
        turn.admitted = next(self.serial)
        self.running.append(turn)
        seconds = (request.num_tokens - hit) / PREFILL_RATE + STRIDE / DECODE_RATE
        self.post(self.now + seconds, (turn, turn.admitted))
        return True

    def release(self, turn: Turn) -> None:
        assert turn.request is not None
        self.manager.free(turn.request)
        turn.request.num_computed_tokens = 0

    def decode(self, turn: Turn) -> None:
        """The next tokens of the answer; the youngest request makes room for them."""
        request = turn.request
        assert request is not None
        tokens = min(STRIDE, turn.answer - request.num_output_tokens)
        if tokens == 0:
            self.finish(turn)
            return
        while self.manager.allocate_slots(request, tokens) is None:
            youngest = self.running.pop()
            self.preemptions += 1
            youngest.admitted = 0
            self.release(youngest)
            self.waiting.appendleft(youngest)
            if youngest is turn:
                return
        request.append_output_token_ids([0] * tokens)
        # The last block of the stride is cached when the next begins, or never.
        request.num_computed_tokens += tokens
        self.manager.cache_blocks(request, request.num_computed_tokens)
        self.post(self.now + STRIDE / DECODE_RATE, (turn, turn.admitted))

    def finish(self, turn: Turn) -> None:
        self.running.remove(turn)
        assert turn.request is not None
        self.manager.free(turn.request)
        turn.request = None
        self.served[turn.chat.number, turn.index] = turn
        turn.hashes = []
        self.post(self.now + think_time(turn.chat.rng), turn.chat)
        self.admit()


def again(turn: Turn) -> int:
    """Tokens that the turn computed and somebody had computed before."""
    return turn.computed - (turn.prompt - turn.known)


def optimum(turn: Turn) -> int:
    """The same where nothing is ever lost: what a block's size leaves."""
    hit = min(turn.known, turn.prompt - 1) // BLOCK_SIZE * BLOCK_SIZE
    return turn.known - hit


def summary(engine: str, pool: float, day: Day) -> dict:
    """Means over the turns served; ``*_paired`` over those that stock serves, too."""

    def mean(of: Callable[[Turn], float], turns: Iterable[Turn]) -> float:
        return round(statistics.mean(map(of, turns)), 1)

    turns = list(day.served.values())
    both = [turn for turn in turns if turn.blocks <= day.num_blocks]
    return {
        "engine": engine,
        "pool_gib": f"{pool:g}",
        "chats": len(day.turns),
        "turns": len(turns),
        "refused": day.refused,
        "preemptions": day.preemptions,
        "prompt": mean(lambda turn: turn.prompt, turns),
        "new": mean(lambda turn: turn.prompt - turn.known, turns),
        "again": mean(again, turns),
        "optimum": mean(optimum, turns),
        "turns_paired": len(both),
        "new_paired": mean(lambda turn: turn.prompt - turn.known, both),
        "again_paired": mean(again, both),
        "optimum_paired": mean(optimum, both),
    }


def write_rows(new: list[dict]) -> None:
    """Write rows to the table: each replaces its like, the others stay."""
    where = {
        "block_size": BLOCK_SIZE,
        "num_sink_tokens": NUM_SINK_TOKENS,
        "window_size": WINDOW_SIZE,
        "vllm": vllm.__version__,
        "commit": common.commit(),
    }
    path = common.RESULTS / "chats.csv"
    rows: dict[tuple[str, str], dict] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                rows[row["engine"], row["pool_gib"]] = row
    for row in new:
        rows[row["engine"], row["pool_gib"]] = row | where
    in_order = sorted(rows, key=lambda key: (float(key[1]), ENGINES.index(key[0])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in in_order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=float, nargs="+", default=POOLS)
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES[:-1],
        default=("stock", "retention 0", "sink"),
    )
    parser.add_argument("--chats", type=int, default=CHATS)
    args = parser.parse_args()
    for pool in args.pools:
        for engine in args.engines:
            start = time.monotonic()
            day = Day(engine, pool, args.chats)
            day.run()
            row = summary(engine, pool, day)
            print(*row.values(), f"{time.monotonic() - start:.0f} s", flush=True)
            write_rows([row])


if __name__ == "__main__":
    main()
