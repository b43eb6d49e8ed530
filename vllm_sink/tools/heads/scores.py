"""Scores of KV heads without training: attention to a text's first reading.

A passage of real prose is read twice over. For the tokens of the second copy,

echo
    is the mean attention to the same token of the first copy,
induction
    is the mean attention to that token's successor.

Retrieving takes both: echo heads match the question's words with the needle's,
induction heads copy what follows. A KV head has the larger value of its query heads.
The KV heads are ranked by each; one that is high in either ranking is a retrieval
head: its place is the better of its two ranks, ties by induction. (Ranks: the larger
of the two values keeps fewer needles.) Two forward passes of 640 tokens; on disjoint
texts the ranks agree to .99 (docs/find_heads.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_sink.policy.head_map import num_chosen
from vllm_sink.tools.heads import texts
from vllm_sink.tools.heads.attention import Headwise, Layers

NUM_PASSAGES = 2
PASSAGE_LENGTH = 320


@dataclass(frozen=True)
class Scores:
    """Measurements of every KV head, [L, HKV] fp32 on the CPU.

    Args:
        value: The score: (0, 1], 1 for the best; 0 where a layer has no choice.
        measured: Name -> what the score is made of.
        layers: The model's layers.
    """

    value: torch.Tensor
    measured: dict[str, torch.Tensor]
    layers: Layers

    def order(self) -> list[tuple[int, int]]:
        """(layer, KV head) from the best on."""
        places = sorted(
            (-float(self.value[layer, head]), layer, head)
            for layer in self.layers.full
            for head in range(self.layers.num_kv_heads)
        )
        return [(layer, head) for _, layer, head in places]


@torch.inference_mode()
def echo_and_induction(
    model, passage: list[int], layers: Layers, opening: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, H] each, H query heads: the passage read twice over.

    A head of a layer whose keys others read, too, has the largest value of them. The
    last token of the second copy has no successor in the first; it is left out.
    """
    size, start = len(passage), len(opening) + len(passage)
    rows: dict[str, dict[int, torch.Tensor]] = {"echo": {}, "induction": {}}

    def watch(layer: int, weights: torch.Tensor, first: int) -> None:
        count = min(first + weights.shape[3], start + size - 1) - first
        query = torch.arange(count, device=weights.device)
        same = query + first - size
        for name, keys in (("echo", same), ("induction", same + 1)):
            mass = weights[0, :, :, query, keys].sum(-1).float().cpu().flatten()
            found = rows[name]
            found[layer] = found.get(layer, 0) + mass / (size - 1)

    tokens = torch.tensor([opening + passage + passage], device=model.device)
    with Headwise(watch=watch, watch_from=start):
        # Without the head: logits of 640 tokens would be the largest tensor.
        model.base_model(tokens, use_cache=False)
    empty = torch.zeros_like(next(iter(rows["echo"].values())))
    for found in rows.values():
        for reader, owner in layers.readers:
            found[owner] = torch.maximum(found[owner], found.pop(reader))
    echo, induction = (
        torch.stack([rows[name].get(i, empty) for i in range(layers.num_layers)])
        for name in ("echo", "induction")
    )
    return echo, induction


def find(
    model,
    tokenizer,
    text: str,
    layers: Layers,
    on_progress: Callable[[], None] = lambda: None,
) -> Scores:
    """Score every KV head on passages of ``text``."""
    start = texts.opening(tokenizer)
    sums = [torch.zeros(()), torch.zeros(())]
    for passage in texts.passages(tokenizer, text, NUM_PASSAGES, PASSAGE_LENGTH):
        found = echo_and_induction(model, passage, layers, start)
        sums = [total + value for total, value in zip(sums, found, strict=True)]
        on_progress()
    shape = (layers.num_layers, layers.num_kv_heads, -1)
    echo, induction = ((total / NUM_PASSAGES).view(shape).amax(2) for total in sums)
    return combine(echo, induction, layers)


def combine(echo: torch.Tensor, induction: torch.Tensor, layers: Layers) -> Scores:
    """Scores from the values of all KV heads, [L, HKV] each."""
    heads = [(i, h) for i in layers.full for h in range(layers.num_kv_heads)]
    ranks = {}
    for name, values in (("echo", echo), ("induction", induction)):
        # Sorting is stable: equal values go by layer, then head.
        order = sorted(heads, key=lambda head: -float(values[head]))
        ranks[name] = {head: place for place, head in enumerate(order)}

    def place(head: tuple[int, int]) -> tuple[int, int]:
        by_induction = ranks["induction"][head]
        return min(by_induction, ranks["echo"][head]), by_induction

    measured = {"echo": echo, "induction": induction}
    return ranked(sorted(heads, key=place), measured, layers)


def ranked(order: list[tuple[int, int]], measured, layers: Layers) -> Scores:
    """Scores by places: 1 for the first (layer, KV head) of ``order``, down to 1/n."""
    score = torch.zeros(layers.num_layers, layers.num_kv_heads)
    for index, head in enumerate(order):
        score[head] = 1 - index / len(order)
    return Scores(score, measured, layers)


def continued(first: Scores, rest: Scores, share: float) -> Scores:
    """The best of ``first``, as many as ``share`` says, then the others by ``rest``."""
    order = first.order()
    best = order[: num_chosen(share, len(order))]
    others = [head for head in rest.order() if head not in set(best)]
    measured = {**first.measured, **rest.measured}
    return ranked(best + others, measured, first.layers)


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's, of two scores without ties; [L, HKV] each."""
    ranks = [x.flatten().argsort().argsort().double() for x in (one, other)]
    a, b = (rank - rank.mean() for rank in ranks)
    return float((a * b).sum() / (a.norm() * b.norm()))
