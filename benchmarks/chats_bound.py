"""What no order of blocks could do better: the day of benchmarks.chats with foresight.

    python -m benchmarks.chats_bound [--pools 1 2 4 8 16 32 50 100]

A linear program chooses, knowing the whole day, of which chats a pool keeps what their
next turn hits while they wait: as many blocks as sinks and window take, or the whole
history where that is shorter. It is a bound for every order: a part of a tail saves its
part of the history (in truth nothing), system prompts take no room, requests that run
hold sinks and window alone and are never late.

Writes the rows ``foresight`` of benchmarks/results/chats.csv.
"""

from __future__ import annotations

import argparse
import heapq
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, count, pairwise

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from benchmarks import chats
from benchmarks.chats import BLOCK_SIZE, Chat, Turn, optimum, think_time
from vllm_sink.policy.layout import RetentionPolicy

POLICY = RetentionPolicy(chats.NUM_SINK_TOKENS, chats.WINDOW_SIZE)
MOST_HELD = 1 + POLICY.blocks_before_hit(BLOCK_SIZE)  # sinks, in one block, and window


@dataclass
class Served:
    """A turn, and when it runs if nothing is ever computed again.

    Args:
        system: Tokens of the chat's system prompt.
    """

    turn: Turn
    start: float
    end: float
    system: int

    @property
    def hit(self) -> int:
        return self.turn.known - optimum(self.turn)


def serve_day(num_chats: int) -> dict[int, list[Served]]:
    """The turns of every chat."""
    seen: set[int] = set()
    serial = count()
    events: list[tuple[float, int, Chat]] = []
    turns = {}
    for number in range(num_chats):
        chat = Chat(number, seen)
        turns[number] = chat.next_turns()
        events.append((chat.starts_at, next(serial), chat))
    heapq.heapify(events)
    served: dict[int, list[Served]] = {number: [] for number in turns}
    while events:
        now, _, chat = heapq.heappop(events)
        turn = next(turns[chat.number], None)
        if turn is None:
            continue
        system = int(turn.hashes[0].split(b".")[0].removeprefix(b"system"))
        turn.hashes = []
        steps = -(-turn.answer // chats.STRIDE) + 1
        seconds = (turn.prompt - turn.known + optimum(turn)) / chats.PREFILL_RATE
        end = now + seconds + steps * chats.STRIDE / chats.DECODE_RATE
        served[chat.number].append(Served(turn, now, end, chats.SYSTEM_PROMPTS[system]))
        heapq.heappush(events, (end + think_time(chat.rng), next(serial), chat))
    return served


class Bound:
    """The program of one day; :meth:`again` solves it for a pool."""

    def __init__(self, served: dict[int, list[Served]]) -> None:
        self.turns = [each for chat in served.values() for each in chat]
        waits = [pair for chat in served.values() for pair in pairwise(chat)]
        self.next = [later for _, later in waits]
        starts = sorted(earlier.end for earlier, _ in waits)
        blocks = [min(later.hit // BLOCK_SIZE, MOST_HELD) for later in self.next]
        # A hit of the system prompt is there anyway.
        self.saved = np.array(
            [
                later.hit - min(later.hit, later.system // BLOCK_SIZE * BLOCK_SIZE)
                for later in self.next
            ]
        )
        rows, columns = [], []
        for column, (earlier, later) in enumerate(waits):
            first, end = (
                bisect_left(starts, earlier.end),
                bisect_left(starts, later.start),
            )
            rows.append(np.arange(first, end))
            columns.append(np.full(end - first, column))
        row, column = np.concatenate(rows), np.concatenate(columns)
        values = np.array(blocks, float)[column]
        self.waiting = csr_array((values, (row, column)), (len(starts), len(waits)))
        changes = sorted(
            change
            for each in self.turns
            for held in [min(each.turn.blocks, MOST_HELD)]
            for change in ((each.start, held), (each.end, -held))
        )
        times = [time for time, _ in changes]
        held = [0, *accumulate(change for _, change in changes)]
        self.running = np.array([held[bisect_right(times, time)] for time in starts])

    def again(self, num_blocks: int, longest: float) -> float:
        """Tokens computed again a turn, of turns of at most ``longest`` blocks."""
        counts = np.array([each.turn.blocks <= longest for each in self.next])
        saved = np.where(counts, self.saved, 0)
        room = np.maximum(num_blocks - self.running, 0)
        solved = linprog(-saved, self.waiting, room, bounds=(0, 1), method="highs-ipm")
        assert solved.status == 0, solved.message
        turns = [each.turn for each in self.turns if each.turn.blocks <= longest]
        lost = saved.sum() + solved.fun + sum(map(optimum, turns))
        return round(lost / len(turns), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", type=float, nargs="+", default=(*chats.POOLS, 100))
    parser.add_argument("--chats", type=int, default=chats.CHATS)
    args = parser.parse_args()
    served = serve_day(args.chats)
    bound = Bound(served)
    for pool in args.pools:
        num_blocks = int(pool * 2**30) // chats.BLOCK_BYTES
        row = {
            "engine": "foresight",
            "pool_gib": f"{pool:g}",
            "chats": len(served),
            "turns": len(bound.turns),
            "again": bound.again(num_blocks, np.inf),
            "turns_paired": sum(each.turn.blocks <= num_blocks for each in bound.turns),
            "again_paired": bound.again(num_blocks, num_blocks),
        }
        print(*row.values(), flush=True)
        chats.write_rows([row])


if __name__ == "__main__":
    main()
