"""The map of retrieval heads, chosen by score.

A *retrieval head* keeps everything (or a window of its own), a *streaming head*
the sinks and the window (DuoAttention, arXiv 2410.10819). All query heads of a
KV head share its policy::

    scores [layers][KV heads]   --fraction, layers-->   HeadMap (true: retrieval)

Files of scores are read by :mod:`vllm_sink.settings.pattern_files`, once, in the
process that configures the engine; workers get values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Scores = list[list[float]]
# A score from which a head is a retrieval head where no fraction is given.
THRESHOLD = 0.5
# A trained score may be this far below 0 or above 1.
OVERSHOOT = 0.1
# Facts of a model that the JSON beside a pattern may state.
FACTS = ("model_type", "hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class HeadMap:
    """A kind for each KV head of a whole model, not of a tensor-parallel rank.

    Args:
        is_retrieval: [layers][KV heads], true for a retrieval head. A layer that the
            policy doesn't govern, or that reads another's keys, has no heads here.
    """

    is_retrieval: tuple[tuple[bool, ...], ...]

    @property
    def num_layers(self) -> int:
        """Layers of the model, of whatever kind."""
        return len(self.is_retrieval)

    @property
    def num_governed_layers(self) -> int:
        """Layers that have heads of their own under the policy."""
        return sum(map(bool, self.is_retrieval))

    @property
    def num_kv_heads(self) -> int:
        """KV heads of one governed layer."""
        return max(map(len, self.is_retrieval))

    @property
    def num_retrieval_heads(self) -> int:
        return sum(map(sum, self.is_retrieval))

    @property
    def num_heads(self) -> int:
        """KV heads of all governed layers."""
        return sum(map(len, self.is_retrieval))

    @property
    def splits_layers(self) -> bool:
        """Whether some layer has heads of both kinds."""
        return any(len(set(layer)) > 1 for layer in self.is_retrieval)

    @property
    def is_uniform(self) -> bool:
        """Whether all heads are of one kind."""
        return self.num_retrieval_heads in (0, self.num_heads)

    def count(self, heads: Iterable[int]) -> int:
        """Retrieval heads among these KV heads, over all layers."""
        heads = list(heads)
        return sum(
            layer[head] for layer in self.is_retrieval if layer for head in heads
        )

    def values(self) -> list[list[int]]:
        """The map as a setting: 1 is a retrieval head, 0 a streaming one."""
        return [[int(head) for head in layer] for layer in self.is_retrieval]


@dataclass(frozen=True)
class ModelShape:
    """The model that a map must fit.

    Args:
        num_layers: Layers of any kind. num_kv_heads: KV heads of a governed layer.
        num_heads: Query heads of a layer.
        facts: What is known of :data:`FACTS`.
        name: For messages.
        owners: For each layer the one whose keys it reads under the policy, as a rule
            itself; None for a layer that the policy doesn't govern. Empty: all do.
    """

    num_layers: int
    num_kv_heads: int
    num_heads: int
    facts: tuple[tuple[str, Any], ...] = ()
    name: str = "the model"
    owners: tuple[int | None, ...] = ()

    def owner(self, layer: int) -> int | None:
        """The layer whose keys ``layer`` reads under the policy, if any."""
        return self.owners[layer] if self.owners else layer

    @property
    def governed(self) -> list[int]:
        """Layers with keys of their own under the policy."""
        return [i for i in range(self.num_layers) if self.owner(i) == i]

    @property
    def readers(self) -> list[int]:
        """Layers that attend under the policy, to keys of their own or another's."""
        return [i for i in range(self.num_layers) if self.owner(i) is not None]


def heads_of_rank(rank: int, num_ranks: int, num_kv_heads: int) -> range:
    """The KV heads that a tensor-parallel rank holds; shared if fewer than ranks."""
    if num_kv_heads >= num_ranks:
        share = num_kv_heads // num_ranks
        return range(rank * share, (rank + 1) * share)
    head = rank // (num_ranks // num_kv_heads)
    return range(head, head + 1)


def num_chosen(fraction: float, num_heads: int) -> int:
    """The number of heads in a fraction, rounded half up: 25% of 90 are 23."""
    return math.floor(fraction * num_heads + 0.5)


def select(
    scores: Sequence[Sequence[float]],
    fraction: float | None = None,
    layers: Iterable[int] = (),
) -> HeadMap:
    """The retrieval heads: the best of all by score, and whole layers.

    Args:
        scores: [layers][KV heads].
        fraction: 0 to 1 of all heads, to the nearest whole head, halves up; ties
            go to the lower layer, then the lower head. None: scores of at least
            :data:`THRESHOLD`.
        layers: Indices of layers all of whose heads are retrieval heads.
    """
    if fraction is None:
        chosen = {
            (i, head)
            for i, layer in enumerate(scores)
            for head, score in enumerate(layer)
            if score >= THRESHOLD
        }
    else:
        order = sorted(
            (-score, i, head)
            for i, layer in enumerate(scores)
            for head, score in enumerate(layer)
        )
        count = num_chosen(fraction, len(order))
        chosen = {(i, head) for _, i, head in order[:count]}
    whole = set(layers)
    return HeadMap(
        tuple(
            tuple(i in whole or (i, head) in chosen for head in range(len(layer)))
            for i, layer in enumerate(scores)
        )
    )


def check_scale(
    scores: Sequence[Sequence[float]], fraction: float | None, source: Any
) -> None:
    """Refuse scores that :data:`THRESHOLD` can't be meant for, without a fraction.

    A fraction ranks scores of any scale; the threshold is for 0 to 1 alone.

    Args:
        scores: [layers][KV heads].
        source: Where they are from: the setting's value.

    Raises:
        ValueError: Names the score, the files and ``retrieval_fraction``.
    """
    if fraction is not None:
        return
    for score in (value for layer in scores for value in layer):
        if not -OVERSHOOT <= score <= 1 + OVERSHOOT:
            files = isinstance(source, str) or all(isinstance(x, str) for x in source)
            raise ValueError(
                "sink.retrieval_heads must be scores from 0 to 1 where no fraction is "
                f"given, got {score!r}{f' in {source!r}' if files else ''}; pass "
                '"retrieval_fraction", which takes the best of any scale: 0.25 makes a '
                "quarter of the KV heads retrieval heads"
            )


def check_fraction(value: Any, name: str) -> None:
    """Refuse what isn't a number from 0 to 1."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ValueError(
            f"{name} must be a number from 0 to 1, got {value!r}; 0.25 makes a "
            "quarter of the KV heads retrieval heads"
        )
