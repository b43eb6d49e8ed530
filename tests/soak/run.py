"""One soak: solo answers, then load, then what must hold afterwards."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.soak.clients import (
    SoakFailure,
    after,
    answers,
    ask,
    client,
    one_client,
    same,
    solo,
)
from tests.soak.deck import Card, Deck
from tests.soak.server import Server

SAMPLE_S = 2.0
IDLE_S = 180.0
RESET_S = 20.0
# Memory: the slope after the warm-up, by the median of pairwise slopes. The worker's
# allocator keeps what a new mix of lengths asked for once: it levels off after some
# six minutes (150, 80, 53, 23, 10 MiB in the minutes before), so that a shorter run
# can only see a leak of this much.
MAX_SLOPE_MIB_PER_MIN = 1.0
MAX_GROWTH_MIB = 256.0
SLOPE_NEEDS_S = 1800.0
# Of a probe, in seconds of the server's own CPU time: other people's programs on the
# machine don't count. Somebody who waits without end meets the client's time-out.
MAX_PROBE_CPU_S = 30.0
HOST_COUNTERS = ("stored_blocks", "loaded_blocks", "hits", "hit_tokens")


@dataclass
class Report:
    """What a soak saw; printed as JSON."""

    seed: int
    seconds: float
    clients: int
    has_host_cache: bool = False
    tally: Counter = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    latencies_cpu: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    processes: list[dict[str, float]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.latencies) or [0.0]
        names = ["evicted_blocks_total", "prefix_hits_total", "prefix_hit_tokens_total"]
        if self.has_host_cache:
            names += [f"host_{name}_total" for name in HOST_COUNTERS]
        return {
            "seed": self.seed,
            "seconds": round(self.seconds),
            "clients": self.clients,
            **dict(self.tally),
            "preemptions": self.counters.get("vllm:num_preemptions_total", 0),
            **{name: self.counters.get(f"vllm:sink_{name}", 0) for name in names},
            "probe_s": [round(statistics.median(ordered), 2), round(ordered[-1], 2)],
            "probe_cpu_s_max": round(max(self.latencies_cpu, default=0.0), 2),
            "memory_mib": [round(m) for _, m in self.memory[:: len(self.memory) - 1]]
            if len(self.memory) > 1
            else [],
            "processes_mib": [
                {name: round(size) for name, size in sizes.items()}
                for sizes in self.processes[:: max(1, len(self.processes) // 6)]
            ],
            "memory_slope_mib_per_min": round(slope(warm(self.memory)), 3),
            "failures": dict(Counter(self.failures)),
        }

    def print(self) -> None:
        print(json.dumps(self.summary(), indent=1), flush=True)


def warm(memory: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The samples of the second half."""
    return memory[len(memory) // 2 :]


def slope(memory: list[tuple[float, float]]) -> float:
    """MiB a minute: the median of pairwise slopes (Theil, 1950; Sen, 1968)."""
    half = len(memory) // 2
    pairs = zip(memory[:half], memory[half:], strict=False)
    slopes = [60 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0]]
    return statistics.median(slopes) if slopes else 0.0


async def soak(
    server: Server,
    deck: Deck,
    report: Report,
    beside: Callable[[Callable[[], bool]], None] | None = None,
) -> None:
    """Load the server and check the invariants; failures go to the report.

    Args:
        beside: Runs in a thread meanwhile; is told whether the time is up. The load
            lasts until it is, and this has ended.
    """
    before = server.counters()
    small = [card for card in deck.cards if card.kind == "length"][2]
    probe_card = Card("probe", "completions", small.body, {**small.extra})
    probe_card.extra["priority"] = -100
    async with client(server.url) as api:
        for card in [*deck.cards, probe_card]:
            await asyncio.to_thread(server.reset_prefix_cache)
            await solo(api, card)
            if card.status == 200 and card.solo is None:
                raise SoakFailure(f"{card.kind}: refused alone")
    start = time.monotonic()
    is_late = after(report.seconds)
    thread = asyncio.create_task(asyncio.to_thread(beside or (lambda _: None), is_late))

    def is_over() -> bool:
        return is_late() and thread.done()

    watching = asyncio.create_task(_watch(server, is_over, start, report))
    loads = [
        one_client(
            server.url, deck.cards, report.seed * 1000 + i, is_over, report.tally
        )
        for i in range(report.clients)
    ]
    loads.append(_probe(server, probe_card, is_over, report))
    for result in await asyncio.gather(thread, *loads, return_exceptions=True):
        if isinstance(result, BaseException):
            report.failures.append(f"{type(result).__name__}: {result}"[:500])
    await watching
    await _check_idle(server, before, report)


async def _probe(
    server: Server, card: Card, is_over: Callable[[], bool], report: Report
) -> None:
    """A small request of the highest priority every second."""
    async with client(server.url) as api:
        while not is_over():
            start, cpu = time.monotonic(), server.cpu_s()
            tokens = answers(card, await ask(api, card))[0][0]
            same(card, tokens, 0)
            report.latencies.append(time.monotonic() - start)
            report.latencies_cpu.append(server.cpu_s() - cpu)
            await asyncio.sleep(1)


async def _watch(
    server: Server, is_over: Callable[[], bool], start: float, report: Report
) -> None:
    """Memory of the server's processes; the prefix cache reset now and then."""
    next_reset = start + RESET_S
    while not is_over():
        now = time.monotonic()
        sizes = server.resident_mib()
        report.memory.append((now - start, sum(sizes.values())))
        report.processes.append(sizes)
        if now >= next_reset:
            next_reset += RESET_S
            await asyncio.to_thread(server.reset_prefix_cache)
            report.tally["resets"] += 1
        await asyncio.sleep(SAMPLE_S)


async def _check_idle(server: Server, before: dict[str, float], report: Report) -> None:
    """Nothing runs: nothing is held, and the counters add up."""
    deadline = time.monotonic() + IDLE_S
    while True:  # hung-up requests are aborted within moments
        after = server.counters()
        if (
            not after["vllm:num_requests_running"]
            and not after["vllm:num_requests_waiting"]
        ):
            break
        if time.monotonic() > deadline:
            report.failures.append("requests still run long after the load")
            break
        await asyncio.sleep(1)
    report.counters = after
    fail = report.failures.append
    for name in (
        "vllm:sink_live_blocks",
        "vllm:sink_pinned_blocks",
        "vllm:kv_cache_usage_perc",
    ):
        if after[name] != before.get(name, 0.0):
            fail(f"{name} is {after[name]} with nothing running")
    # The metrics are written after the last step: the same number twice.
    hits = "vllm:sink_prefix_hit_tokens_total", "vllm:prefix_cache_hits_total"
    ours, theirs = (after[name] - before.get(name, 0.0) for name in hits)
    if ours < theirs:  # preempted requests hit again, which vLLM does not count
        fail(f"{hits[0]} counts {ours}, {hits[1]} {theirs}")
    if not after["vllm:sink_evicted_blocks_total"]:
        fail("no block was evicted: this soak shows nothing")
    for name in HOST_COUNTERS if report.has_host_cache else ():
        if not after[f"vllm:sink_host_{name}_total"]:
            fail(f"vllm:sink_host_{name}_total is 0: this soak shows nothing of it")
    if report.latencies and max(report.latencies_cpu) > MAX_PROBE_CPU_S:
        fail(f"a probe took {max(report.latencies_cpu):.1f} s of CPU time")
    if not report.latencies:
        fail("no probe came back")
    memory = warm(report.memory)
    if len(memory) > 10:
        growth = memory[-1][1] - memory[0][1]
        if report.seconds >= SLOPE_NEEDS_S and slope(memory) > MAX_SLOPE_MIB_PER_MIN:
            fail(f"memory grows by {slope(memory):.2f} MiB a minute")
        if growth > MAX_GROWTH_MIB:
            fail(f"memory grew by {growth:.0f} MiB after the warm-up")
