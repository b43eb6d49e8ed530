"""Failures that the soak must notice."""

import asyncio
import random
import subprocess
import time
from collections import Counter
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest

from tests.soak import clients, faults
from tests.soak.clients import TIE, Aborted, SoakFailure, check_refusal, same, stream
from tests.soak.deck import Card, Deck
from tests.soak.faults import Lives
from tests.soak.server import Server


@pytest.fixture
def card() -> Card:
    """Alone it answered 5, 6, 7; of the last the runner-up was as good."""
    return Card("kind", "completions", {}, solo=[([5, 6, 7], [1.0, 2 * TIE, TIE / 2])])


def test_an_answer_is_the_solo_runs_up_to_a_tie(card):
    assert same(card, [5, 6, 7], 0)
    assert not same(card, [5, 6, 9], 0)


@pytest.mark.parametrize("tokens", [[4, 6, 7], [5, 9, 7], [5, 6], [5, 6, 7, 8], []])
def test_another_answer_is_a_failure(card, tokens):
    with pytest.raises(SoakFailure, match="kind"):
        same(card, tokens, 0)


@pytest.mark.parametrize(
    "status, reason, is_fine",
    [(400, "prompt must be shorter", True), (400, "no", False), (500, "x" * 20, False)],
)
def test_a_refusal_is_a_400_with_a_reason(status, reason, is_fine):
    refused = Card("too long", "completions", {}, status=400)
    error = type("Error", (), {"status_code": status, "message": reason})
    if is_fine:
        check_refusal(refused, error)
    else:
        with pytest.raises(SoakFailure):
            check_refusal(refused, error)


def event(tokens, finish_reason=None) -> SimpleNamespace:
    choice = SimpleNamespace(token_ids=tokens, finish_reason=finish_reason)
    return SimpleNamespace(choices=[choice])


@pytest.mark.parametrize(
    "events, error",
    [
        ([event([5, 6]), event([7], "length")], None),
        ([event([5, 6]), event([], "abort")], Aborted),
        ([], Aborted),  # refused while the server drains
        ([event([5, 6])], SoakFailure),  # cut, and nobody said so
        ([event([5, 9]), event([7], "length")], SoakFailure),
    ],
)
def test_a_stream_is_whole_or_says_that_it_is_not(monkeypatch, card, events, error):
    class Events:
        response = SimpleNamespace(aclose=lambda: asyncio.sleep(0))

        async def __aiter__(self):
            for one in events:
                yield one

    async def ask(api, card, **more):
        return Events()

    monkeypatch.setattr(clients, "ask", ask)
    tally: Counter = Counter()
    if error:
        with pytest.raises(error):
            asyncio.run(stream(None, card, tally, None))
        assert not tally["finished"]
    else:
        asyncio.run(stream(None, card, tally, None))
        assert tally["finished"] == 1


def test_a_server_that_failed_is_no_wrong_answer(monkeypatch):
    """Whatever the card is and whichever way it is asked."""
    response = httpx.Response(500, request=httpx.Request("POST", "http://x"))

    async def ask(api, card, **more):
        raise openai.InternalServerError("engine dead", response=response, body=None)

    monkeypatch.setattr(clients, "ask", ask)
    monkeypatch.setattr(faults, "ask", ask)
    for seed, card in enumerate(c for c in Deck(1, 1000, 512).cards if c.status == 200):
        for way in range(4):
            rng = random.Random(10 * seed + way)
            assert not asyncio.run(faults._is_answered(None, card, rng, Counter()))


def test_a_life_that_fails_is_told_and_the_next_one_is_led(tmp_path, capsys):
    def failing(lives):
        yield "first", "seen"
        raise SoakFailure("left behind: 1 process")

    def good(lives):
        yield "second", "seen"

    lives = Lives("model", [], tmp_path, Deck(1, 1000, 512).cards, None, 1)
    lives.lead([failing, good], lambda: True)
    assert lives.failures == ["failing: SoakFailure: left behind: 1 process"]
    assert set(lives.seen) == {"first", "second"}
    assert "| second | 1 | seen |" in lives.table()


def test_what_has_ended_is_not_left_behind(tmp_path):
    """A child whose parent has not asked for its status is a zombie."""
    server = Server.__new__(Server)
    server.tmp, server.segments = tmp_path, set()
    parent = subprocess.Popen(["sh", "-c", "true & exec sleep 60"])
    try:
        sleeping = psutil.Process(parent.pid)
        while sleeping.name() != "sleep" or not sleeping.children():
            time.sleep(0.01)
        (ended,) = sleeping.children()
        while ended.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        server.children = [sleeping, ended]
        assert server.left_behind(patience_s=0) == ["sleep 60"]
    finally:
        parent.kill()
        parent.wait()
