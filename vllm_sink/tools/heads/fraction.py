"""The fraction of retrieval heads that a model needs to find needles.

The smallest fraction whose answer loss is within ``MARGIN`` of full attention's, and
that keeps ``HITS_KEPT`` of the needles that full attention finds. The loss decides, as
it is less noisy than hits; the hits confirm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_sink.policy.head_map import num_chosen
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import needles
from vllm_sink.tools.heads.scores import Scores

MARGIN = 0.1  # nats a token of the answer
HITS_KEPT = 0.8
FRACTIONS = (0.0, 0.1, 0.2, 0.25, 0.33, 0.5, 0.75)
LEAST_HITS = 0.25  # of the needles: below it full attention can't do the task


def best_heads(scores: Scores, fraction: float) -> torch.Tensor:
    """[L, HKV] bool: the best heads, as many as the fraction of those with a choice."""
    kept = torch.zeros_like(scores.value, dtype=torch.bool)
    for layer, head in scores.order()[: num_chosen(fraction, scores.layers.num_heads)]:
        kept[layer, head] = True
    return kept


@dataclass(frozen=True)
class Point:
    """The needles found under one policy.

    Args:
        fraction: Of the KV heads that keep everything; 1.0 is full attention.
        num_heads: How many these are.
        loss: Mean over the answers, nats a token.
        hits: Share of the answers whose every token is the most likely one.
        num_needles: Answers.
    """

    fraction: float
    num_heads: int
    loss: float
    hits: float
    num_needles: int

    @classmethod
    def of(cls, fraction: float, num_heads: int, answers: list[needles.Answer]):
        """The mean of the answers."""
        count = len(answers)
        loss = sum(answer.loss for answer in answers) / count
        hits = sum(answer.hit for answer in answers) / count
        return cls(fraction, num_heads, loss, hits, count)


@dataclass(frozen=True)
class Curve:
    """Fractions tried, in ascending order up to the chosen one."""

    points: list[Point]
    full: Point
    chosen: float
    why: str

    def as_dict(self) -> dict[str, Any]:
        """The values for JSON."""
        points = [asdict(point) for point in [*self.points, self.full]]
        return {"chosen": self.chosen, "why": self.why, "points": points}


def is_enough(point: Point, full: Point) -> bool:
    """Whether the policy is as good as full attention, by loss and by hits."""
    return point.loss <= full.loss + MARGIN and point.hits >= HITS_KEPT * full.hits


def measure(
    model,
    haystacks: list[needles.Haystack],
    scores: Scores,
    policy: RetentionPolicy,
    fractions: Iterable[float],
    on_progress: Callable[[], None] = lambda: None,
) -> Curve:
    """Try the fractions in ascending order, up to the first that is enough.

    Raises:
        ValueError: Full attention itself misses most needles.
    """

    prefixes = [needles.read_prefix(model, haystack, policy) for haystack in haystacks]

    def point(fraction: float, heads: torch.Tensor | None) -> Point:
        answers = []
        used = None if heads is None else policy
        for haystack, prefix in zip(haystacks, prefixes, strict=True):
            answers += needles.ask(model, haystack, used, heads, prefix)
            on_progress()
        count = scores.layers.num_heads if heads is None else int(heads.sum())
        return Point.of(fraction, count, answers)

    full = point(1.0, None)
    if full.hits < LEAST_HITS:
        raise ValueError(
            f"--fraction auto needs a model that finds needles with full attention, got"
            f" {full.hits:.0%} of {full.num_needles}; give a number, for example "
            "--fraction 0.5"
        )
    points: list[Point] = []
    for share in fractions:
        points.append(point(share, best_heads(scores, share)))
        if is_enough(points[-1], full):
            break
    chosen = choose(points, full)
    if chosen is None:
        why = (
            "no fraction that was tried is as good as full attention: all heads keep "
            "everything"
        )
        return Curve(points, full, 1.0, why)
    why = (
        f"the smallest whose answer loss ({chosen.loss:.2f}) is within {MARGIN} nat of "
        f"full attention's ({full.loss:.2f}); it finds {chosen.hits:.0%} of "
        f"{full.num_needles} needles, full attention {full.hits:.0%}"
    )
    return Curve(points, full, chosen.fraction, why)


def choose(points: list[Point], full: Point) -> Point | None:
    """The smallest fraction that is enough."""
    return next((p for p in points if is_enough(p, full)), None)
