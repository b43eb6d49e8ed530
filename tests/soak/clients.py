"""Clients of a soak, through the openai package."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import openai

from tests.soak.deck import Card

MODEL = "model"
# A token may differ from the solo run's where the two best were this close in it
# (natural log, float32): the order of a sum depends on the batch.
TIE = 1e-3


class SoakFailure(AssertionError):
    """An invariant that did not hold."""


class Aborted(Exception):
    """The server gave the request up and said so in its ``finish_reason``."""


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has gone by since this call."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def client(url: str, timeout_s: float = 300) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=url + "/v1", api_key="none", timeout=timeout_s, max_retries=0
    )


async def ask(api: openai.AsyncOpenAI, card: Card, **more: Any) -> Any:
    """The whole response, with token ids and the two best log-probabilities."""
    extra = {**card.extra, "return_token_ids": True}
    if card.route == "chat":
        return await api.chat.completions.create(
            model=MODEL,
            logprobs=True,
            top_logprobs=2,
            extra_body=extra,
            **card.body,
            **more,
        )
    return await api.completions.create(
        model=MODEL, logprobs=2, extra_body=extra, **card.body, **more
    )


def answers(card: Card, response: Any) -> list[tuple[list[int], list[float]]]:
    """Per choice its tokens, and how far the runner-up was behind each."""
    result = []
    for choice in response.choices:
        check_finished(choice)
        margins = []
        if card.route == "chat":
            rows = [[top.logprob for top in c.top_logprobs] for c in _content(choice)]
        else:
            rows = [list(top.values()) for top in choice.logprobs.top_logprobs]
        for row in rows:
            best = sorted(row, reverse=True)
            margins.append(best[0] - best[1] if len(best) > 1 else 0.0)
        result.append((list(choice.token_ids), margins))
    return result


def check_finished(choice: Any) -> None:
    if choice.finish_reason == "abort":
        raise Aborted


def _content(choice: Any) -> list:
    return choice.logprobs.content or []


async def solo(api: openai.AsyncOpenAI, card: Card) -> None:
    """Ask while nothing else runs, and keep the answer."""
    try:
        card.solo = answers(card, await ask(api, card))
    except openai.APIStatusError as error:
        check_refusal(card, error)


def check_refusal(card: Card, error: openai.APIStatusError) -> None:
    reason = str(error.message).strip()
    if error.status_code != card.status or len(reason) < 10:
        raise SoakFailure(f"{card.kind}: {error.status_code} {reason[:300]!r}")


def same(card: Card, tokens: list[int], index: int) -> bool:
    """Whether choice ``index`` has the solo run's tokens, up to a tie.

    Raises:
        SoakFailure: They differ where the solo run was sure.
    """
    assert card.solo is not None, card.kind
    want, margins = card.solo[index]
    for at, (got, expected) in enumerate(zip(tokens, want, strict=False)):
        if got != expected:
            if margins[at] < TIE:
                return False
            raise SoakFailure(
                f"{card.kind}: token {at} is {got}, alone it was {expected}, "
                f"{margins[at]:.4f} ahead of the next"
            )
    if len(tokens) != len(want):
        raise SoakFailure(f"{card.kind}: {len(tokens)} tokens, alone {len(want)}")
    return True


async def whole(api: openai.AsyncOpenAI, card: Card, tally: Counter) -> None:
    """One request, its answer compared with the solo run's."""
    try:
        response = await ask(api, card)
    except openai.APIStatusError as error:
        check_refusal(card, error)
        tally["refused"] += 1
        return
    if card.status != 200:
        raise SoakFailure(f"{card.kind}: answered, must be refused")
    for index, (tokens, _) in enumerate(answers(card, response)):
        tally["same" if same(card, tokens, index) else "tie"] += 1
    tally["finished"] += len(response.choices)


async def stream(
    api: openai.AsyncOpenAI, card: Card, tally: Counter, hang_up_after: int | None
) -> None:
    """One request as a stream; closed early, or read to its end and compared."""
    if card.status != 200 or card.body.get("n", 1) > 1:
        return await whole(api, card, tally)
    tokens: list[int] = []
    has_choice = False
    events = await ask(api, card, stream=True)
    count = 0
    async for event in events:
        count += 1
        for choice in event.choices:  # chat's first and last events have none
            has_choice = True
            tokens += getattr(choice, "token_ids", None) or []
            check_finished(choice)
        if hang_up_after is not None and count >= hang_up_after:
            tally["hung up"] += 1
            break
    await events.response.aclose()
    if hang_up_after is not None and count >= hang_up_after:
        return
    if not has_choice:  # how vLLM 0.32 refuses a stream while it drains
        raise Aborted
    tally["same" if same(card, tokens, 0) else "tie"] += 1
    tally["finished"] += 1


async def one_client(
    url: str,
    cards: list[Card],
    seed: int,
    is_over: Callable[[], bool],
    tally: Counter,
) -> None:
    """Requests one after another until it is over."""
    rng = random.Random(seed)
    async with client(url) as api:
        while not is_over():
            card = rng.choice(cards)
            way = rng.random()
            if way < 0.5:
                await whole(api, card, tally)
            elif way < 0.85:
                await stream(api, card, tally, None)
            else:
                await stream(api, card, tally, rng.randrange(1, 6))
            await asyncio.sleep(rng.random() * 0.2)
