"""The requests of a soak: a deck of bodies whose solo answers are known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

WORDS = """
lamp rock harbour letter winter garden seven engine river stone market glass captain
silver window forest paper bridge morning candle copper orchard
""".split(  # noqa: SIM905, a list of words reads better as words
)


@dataclass
class Card:
    """One request and what it must answer.

    Args:
        kind: What it tries, for the report.
        route: ``completions`` or ``chat``.
        body: The openai package's arguments without ``model``.
        extra: vLLM's own fields.
        status: The HTTP status that must come back; 200 answers as in ``solo``.
        solo: Per choice, the tokens of its answer when nothing else ran, and per
            token how far the runner-up was behind (natural log).
    """

    kind: str
    route: str
    body: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    solo: list[tuple[list[int], list[float]]] | None = None


class Deck:
    """Cards of every kind, drawn from one seed.

    Args:
        seed: Of the bodies.
        vocab: Tokens below this are used in prompts of tokens.
        max_model_len: The server's, tokens.
    """

    def __init__(self, seed: int, vocab: int, max_model_len: int) -> None:
        self.rng = random.Random(seed)
        self.vocab = vocab
        self.max_model_len = max_model_len
        self.system = self._tokens(max_model_len // 6)
        self.cards: list[Card] = []
        for length in (1, 2, 15, 16, 17, 100, max_model_len - 9):
            self._completion("length", self._tokens(length), 8)
        for _ in range(10):  # one prefix that all share
            tail = self._tokens(self.rng.randrange(1, max_model_len // 2))
            self._completion("shared prefix", self.system + tail, 12)
        chat: list[int] = list(self.system)
        for _ in range(6):  # one prefix that grows
            chat = chat + self._tokens(max_model_len // 10)
            self._completion("growing prefix", list(chat), 12)
        for _ in range(4):
            self._completion("long answer", self._tokens(40), max_model_len // 2)
        for n in (2, 3):  # vLLM refuses n > 1 at temperature 0; no seed: vLLM 0.32
            # on a CPU ends its engine where a seeded request's prompt comes in
            # chunks ("CPU Generator does not use offset"), sink or not.
            card = self._completion("n", self._tokens(120), 10, n=n, temperature=1)
            card.extra["top_k"] = 1
        for level in (-3, 5):
            card = self._completion("priority", self._tokens(200), 10)
            card.extra["priority"] = level
        self._completion("stop", self._tokens(30), 40, stop=[self._word(), " "])
        for _ in range(6):
            self._chat("chat", 10)
        card = self._chat("structured", 24)
        card.extra["structured_outputs"] = {"regex": "(yes|no), (one|two|three)"}
        beyond = max_model_len + 1
        self._refused("too long", prompt=self._tokens(beyond), max_tokens=1)
        self._refused("no such token", prompt=[10**9], max_tokens=1)
        self._refused("bad temperature", prompt="x", temperature=-4.0)

    def draw(self) -> Card:
        return self.rng.choice(self.cards)

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(100, self.vocab) for _ in range(count)]

    def _word(self) -> str:
        return self.rng.choice(WORDS)

    def _completion(self, kind: str, prompt, max_tokens: int, **body: Any) -> Card:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **body}
        self.cards.append(Card(kind, "completions", body, {"ignore_eos": True}))
        return self.cards[-1]

    def _chat(self, kind: str, max_tokens: int) -> Card:
        text = " ".join(self._word() for _ in range(self.rng.randrange(3, 60)))
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        self.cards.append(Card(kind, "chat", body))
        return self.cards[-1]

    def _refused(self, kind: str, **body: Any) -> None:
        self.cards.append(Card(kind, "completions", body, status=400))
