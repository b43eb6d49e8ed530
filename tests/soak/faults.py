"""Scenarios of faults along a soak: one server after another, a fault each.

A life is a function in :mod:`tests.soak.fault_servers` or :mod:`tests.soak.fault_ray`
that starts servers of its own beside the soak's, asks them the soak's deck and says
what it saw of each fault. The answers must be the soak's own server's throughout.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from tests.soak.clients import (
    Aborted,
    SoakFailure,
    after,
    answers,
    ask,
    client,
    one_client,
    same,
    stream,
)
from tests.soak.deck import Card
from tests.soak.server import Server

# What a server that gets SIGTERM gives its requests; a flag of all of these. With
# vLLM 0.32's default of 0 its API server kills the engine core before that can abort
# them, and waits without end for clients who wait for it.
SHUTDOWN_S = 30
# vLLM notices a dead engine core at once and gives each of its processes 5 s to end;
# the rest is for a machine whose cores others have, too.
MAX_ERROR_S = SHUTDOWN_S + 60.0
MAX_END_S = SHUTDOWN_S + 60.0
# vLLM 0.32 leaves ZeroMQ's socket files and torch's cache in TMPDIR after any end, and
# the segments of its CPU workers after a killed one, without this plugin, too.
LEFT_BY_VLLM = re.compile(
    r"/([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|torchinductor_\w+)$"
)
CLIENTS = 8
BEFORE_S = 4.0  # of load before a fault


@dataclass
class Lives:
    """What the lives are led with, and what was seen.

    Args:
        model, flags: The soak's server's.
        folder: For logs and whatever else.
        cards: The soak's deck, its answers known.
        main: The soak's own server, under load meanwhile.
        seed: Of the choice of cards.
    """

    model: str
    flags: list[str]
    folder: Path
    cards: list[Card]
    main: Server
    seed: int
    seen: dict[str, list[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    answers: Counter = field(default_factory=Counter)
    count: int = 0

    def lead(
        self,
        lives: list[Callable[[Lives], Iterator[tuple[str, str]]]],
        is_late: Callable[[], bool],
    ) -> None:
        """All of them once, and again until it is late."""
        while lives:
            for life in lives:
                if self.count >= len(lives) and is_late():
                    return
                self.count += 1
                start = time.monotonic()
                try:
                    for fault, sight in life(self):
                        self.saw(fault, sight)
                except Exception as error:  # a life that failed; the others are led
                    text = f"{life.__name__}: {type(error).__name__}: {error}"
                    self.failures.append(text[:1500])
                    print(f"[fault] FAILED {text[:6000]}", flush=True)
                print(f"[fault] {life.__name__}: {time.monotonic() - start:.0f} s")

    def saw(self, fault: str, sight: str) -> None:
        print(f"[fault] {fault}: {sight}", flush=True)
        self.seen.setdefault(fault, []).append(sight)

    @property
    def good(self) -> list[Card]:
        """The cards that are answered."""
        return [card for card in self.cards if card.status == 200]

    def file(self, name: str) -> Path:
        return self.folder / f"{self.count}-{name}"

    def server(self, name: str, *flags: str, **more) -> Server:
        """A server beside the soak's."""
        log = self.file(f"{name}.log")
        return Server(self.model, log, *self.flags, *flags, **more)

    def load(
        self,
        url: str,
        seconds: float,
        fault: Callable[[], object] = lambda: None,
        cards: list[Card] | None = None,
    ) -> str:
        """Ask cards for some seconds, all answers as they were alone.

        Args:
            fault: Happens after half of the time; nobody must notice.
            cards: Left out, all of the deck's.
        """
        tally: Counter = Counter()

        async def happen() -> None:
            await asyncio.sleep(seconds / 2)
            fault()

        async def clients() -> None:
            is_over = after(seconds)
            self.seed += 1
            loads = [
                one_client(
                    url, cards or self.cards, 100 * self.seed + i, is_over, tally
                )
                for i in range(CLIENTS)
            ]
            await asyncio.gather(happen(), *loads)

        asyncio.run(clients())
        if not tally["finished"]:
            raise SoakFailure(f"no answer in {seconds:.0f} s")
        self.answers += tally
        return f"{tally['finished']} answers"

    def load_until_error(self, url: str, fault: Callable[[], object]) -> str:
        """Load a server, let the fault happen, and wait until each client knows.

        An answer before that must be right, and a stream may end short only with
        an error.
        """
        waits: list[float] = []
        when = [0.0]

        async def happen() -> None:
            await asyncio.sleep(BEFORE_S)
            when[0] = time.monotonic()
            await asyncio.to_thread(fault)

        async def clients() -> None:
            self.seed += 1
            loads = [
                _until_error(url, self.good, 100 * self.seed + i, self.answers)
                for i in range(CLIENTS)
            ]
            _, *ends = await asyncio.gather(happen(), *loads)
            waits.extend(ends)

        asyncio.run(clients())
        took = max(waits) - when[0]
        if min(waits) < when[0]:
            raise SoakFailure(f"an error {when[0] - min(waits):.1f} s before the fault")
        if took > MAX_ERROR_S:
            raise SoakFailure(f"a client waited {took:.1f} s for its error")
        return f"{len(waits)} clients had an error within {took:.1f} s"

    def load_until_told(self, url: str, fault: Callable[[], object]) -> str:
        """Load a server that is told to end; each client has its answer or an error.

        None asks anew after that. vLLM 0.32 takes requests until its engine core has
        ended, never answers those of the last moments, and waits for their clients.
        """
        start = time.monotonic()
        errors = self._errors_after(url, fault, None)
        took = time.monotonic() - start - BEFORE_S
        answered = CLIENTS - len(errors)
        return f"{answered} of {CLIENTS} clients had their answer within {took:.1f} s"

    def load_around(self, url: str, seconds: float, fault: Callable[[], object]) -> str:
        """Load a server part of which fails; errors only for some moments after it."""
        before = self.answers["finished"]
        errors = self._errors_after(url, fault, seconds)
        last = f", the last {max(errors):.1f} s after it" if errors else ""
        finished = self.answers["finished"] - before
        return f"{len(errors)} errors{last}, {finished} answers"

    def _errors_after(
        self, url: str, fault: Callable[[], object], seconds: float | None
    ) -> list[float]:
        """Load a server and let the fault happen; when clients had errors after it.

        Args:
            seconds: Of the load; None: nobody asks anew once the fault has happened.
        """
        when = [math.inf]
        tally: Counter = Counter()

        async def happen() -> None:
            await asyncio.sleep(BEFORE_S)
            when[0] = time.monotonic()
            await asyncio.to_thread(fault)

        async def clients() -> list[float]:
            told = lambda: when[0] < math.inf  # noqa: E731
            is_over = told if seconds is None else after(seconds)
            self.seed += 1
            loads = [
                _errors(url, self.good, 100 * self.seed + i, is_over, tally)
                for i in range(CLIENTS)
            ]
            _, *errors = await asyncio.gather(happen(), *loads)
            return [at for times in errors for at in times]

        errors = [at - when[0] for at in asyncio.run(clients())]
        if errors and not 0 <= min(errors) <= max(errors) <= MAX_ERROR_S:
            raise SoakFailure(
                f"errors {min(errors):.1f} to {max(errors):.1f} s after it"
            )
        self.answers += tally
        return errors

    def check_end(self, server: Server, *, killed: bool = False) -> str:
        """Wait for the server's end; its exit, and nothing left behind.

        vLLM 0.32 ends with 0 after its engine core died, too: its launcher tells
        uvicorn to end and forgets why. Any other status is a crash on the way.

        Args:
            killed: A process of it was: its shared memory stays.
        """
        start = time.monotonic()
        try:
            status = server.process.wait(MAX_END_S)
        except subprocess.TimeoutExpired:
            raise SoakFailure(f"it still runs after {MAX_END_S:.0f} s") from None
        took = time.monotonic() - start
        if status not in (0, -15, 143):
            raise SoakFailure(f"exit {status}: {server.first_error()[-1500:]}")
        left = server.left_behind()
        owned = [
            name
            for name in left
            if LEFT_BY_VLLM.search(name) or (killed and name.startswith("/dev/shm/"))
        ]
        if wrong := set(left) - set(owned):
            raise SoakFailure(f"left behind: {sorted(wrong)}")
        end = f"exit {status} {took:.1f} s later"
        return end + (f", vLLM leaves {_count(owned)}" if owned else "")

    def table(self) -> str:
        """Markdown: each fault, how often, what was seen the last time."""
        rows = [
            f"| {fault} | {len(sights)} | {sights[-1]} |"
            for fault, sights in self.seen.items()
        ]
        return "\n".join(
            ["| fault | times | seen (the last) |", "|---|---:|---|", *rows]
        )


def _count(files: list[str]) -> str:
    shared = sum(name.startswith("/dev/shm/") for name in files)
    return f"{len(files) - shared} files and {shared} shared memory segments"


async def _is_answered(
    api: openai.AsyncOpenAI, card: Card, rng: random.Random, tally: Counter
) -> bool:
    """Ask once, whole or as a stream; False where the server failed and said so.

    Raises:
        SoakFailure: The answer is wrong, or short without an error.
    """
    try:
        if rng.random() < 0.5 and "n" not in card.body:  # else it is asked whole
            await stream(api, card, tally, None)
            return True
        response = await ask(api, card)
        for index, (tokens, _) in enumerate(answers(card, response)):
            same(card, tokens, index)
        tally["finished"] += len(response.choices)
        return True
    except openai.APITimeoutError:  # it waits still
        raise
    except openai.APIStatusError as error:
        if error.status_code < 500:
            raise
    except (openai.APIError, httpx.HTTPError, Aborted):  # cut off, or nobody there
        pass
    return False


async def _until_error(url: str, cards: list[Card], seed: int, tally: Counter) -> float:
    """Ask until the server fails; when that was."""
    rng = random.Random(seed)
    async with client(url, timeout_s=120) as api:
        while await _is_answered(api, rng.choice(cards), rng, tally):
            pass
    return time.monotonic()


async def _errors(
    url: str,
    cards: list[Card],
    seed: int,
    is_over: Callable[[], bool],
    tally: Counter,
) -> list[float]:
    """Ask until it is over; when the server failed."""
    rng = random.Random(seed)
    times = []
    async with client(url, timeout_s=120) as api:
        while not is_over():
            if not await _is_answered(api, rng.choice(cards), rng, tally):
                times.append(time.monotonic())
                await asyncio.sleep(0.2)
    return times
