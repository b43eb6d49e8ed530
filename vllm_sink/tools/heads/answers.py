"""Scores of KV heads by what answers need: gates trained on needles.

A haystack is read once, with full attention. Its eight questions and answers are then
read over and over; in them every KV head's output is gate x full attention's +
(1 - gate) x streaming's. The gates start at 0.5 and are trained to keep the loss of the
answers low while their mean is pushed down, ever harder. A gate that stays open long
belongs to a head that answers need; the gates are ranked by their mean over the
training. The first quarter is then tried as it would be served, and a head in it gives
way to one outside where that lowers the loss. Answers tell the other heads hardly
apart: they follow by the recipe of ``scores``.

DuoAttention (arXiv 2410.10819, 2.2) trains the same gates on whole prompts to keep the
last hidden states. Here a step reads 100 tokens, not 600, and asks for what counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vllm_sink.policy.head_map import num_chosen
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import needles, scores, shared
from vllm_sink.tools.heads.attention import Layers
from vllm_sink.tools.heads.scores import Scores

NUM_HAYSTACKS = 8
# Some heads are needed from far away alone: what is found at 1,024 tokens holds at 512,
# and not the other way round.
LONGER = 2
STEPS = 32
LEARNING_RATE = 0.05
# Weight of the mean gate beside the loss of the answers in nats a token: of the first
# step and of the last, growing evenly by ratio.
PRESSURE = (1.0, 20.0)
BY_GATES = 0.25  # of the heads are ranked by their gates
# The first of these stay; so many of the others are tried in the place of the rest.
SURE, TRIED = 0.15, 3
# Of the needles in the first haystacks: below it there is nothing to keep.
LEAST_HITS, NUM_CHECKED = 0.25, 4


@dataclass(frozen=True)
class Reading:
    """A haystack that full attention has read, and its questions.

    Args:
        cache: Transformers', of one sequence; left as it is.
        rows: [questions, longest] tokens, padded on the right.
        targets: [questions, longest]: the token that follows where it is an answer's,
            else ``needles.NO_TARGET``.
    """

    cache: Any
    rows: torch.Tensor
    targets: torch.Tensor

    def logits(self, model, **headwise: Any) -> torch.Tensor:
        """[answer tokens, vocabulary]: ``needles.answer_logits``."""
        rows, targets = self.rows, self.targets
        return needles.answer_logits(model, self.cache, rows, targets, **headwise)

    @torch.no_grad()
    def loss(self, model, policy: RetentionPolicy, retrieval: torch.Tensor) -> float:
        """Of the answers, in nats a token, where these heads keep everything."""
        logits = self.logits(model, policy=policy, retrieval=retrieval)
        return float(cross_entropy(logits, self.answers))

    @torch.no_grad()
    def hits(self, model) -> list[bool]:
        """For each question whether full attention answers it."""
        right = self.logits(model).argmax(-1) == self.answers
        sizes = (self.targets != needles.NO_TARGET).sum(1).tolist()
        return [bool(part.all()) for part in right.split(sizes)]

    @property
    def answers(self) -> torch.Tensor:
        """[answer tokens]"""
        return self.targets[self.targets != needles.NO_TARGET]


# Not inference_mode: its tensors can't be part of a training.
@torch.no_grad()
def read(model, haystack: needles.Haystack) -> Reading:
    """Read the haystack with full attention."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([haystack.tokens], device=model.device)
    model.base_model(tokens, past_key_values=cache, use_cache=True)
    rows, targets = needles.batch(haystack, model.device)
    return Reading(cache, rows, targets)


def find(
    model,
    tokenizer,
    text: str,
    layers: Layers,
    policy: RetentionPolicy,
    length: int,
    *,
    steps: int = STEPS,
    on_progress: Callable[[], None] = lambda: None,
) -> Scores:
    """Score every KV head by gates trained on needles in ``text``.

    Args:
        policy: Of the streaming heads.
        length: Tokens of the haystacks that the fraction is measured on; these here
            have ``LONGER`` times as many.

    Raises:
        ValueError: Full attention itself misses most needles.
    """
    readings, hits = [], []
    for index in range(min(NUM_HAYSTACKS, steps)):
        seed = f"answers {index}"
        made = needles.make(tokenizer, text, LONGER * length, policy.window_size, seed)
        readings.append(read(model, made))
        if index < NUM_CHECKED:
            hits += readings[-1].hits(model)
    if sum(hits) < LEAST_HITS * len(hits):
        raise ValueError(
            "--method answers needs a model that finds needles with full attention, got"
            f" {sum(hits)} of {len(hits)}; use --method recipe with a number, for "
            "example --fraction 0.5"
        )
    gates = train(model, readings, layers, policy, steps, on_progress)
    best = exchanged(model, readings, gates, policy)
    return scores.continued(best, scores.find(model, tokenizer, text, layers), BY_GATES)


def train(
    model,
    readings: list[Reading],
    layers: Layers,
    policy: RetentionPolicy,
    steps: int,
    on_progress: Callable[[], None] = lambda: None,
) -> Scores:
    """Mean gates of all KV heads over ``steps``, each on one reading, in turn."""
    gates = torch.full(
        (layers.num_layers, layers.num_kv_heads), 0.5, device=model.device
    ).requires_grad_()
    free = layers.free.to(model.device)
    optimizer = torch.optim.Adam([gates], lr=LEARNING_RATE)
    total = torch.zeros_like(gates, requires_grad=False)
    for step in range(steps):
        optimizer.zero_grad()
        _loss(model, readings[step % len(readings)], gates, policy)
        (pressure(step, steps) * gates[free].mean()).backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
            total += gates / steps
        on_progress()
    mean = total.cpu()
    # A gate that closed at once still comes before a layer that has no choice.
    score = torch.where(layers.free, mean.clamp(min=1e-6), torch.zeros(()))
    return Scores(score, {"gate": score}, layers)


def exchanged(
    model, readings: list[Reading], gates: Scores, policy: RetentionPolicy
) -> Scores:
    """The scores with other heads in the first quarter, where the loss asks for them.

    The quarter's heads keep everything, the others stream. The slope of the loss says
    what it would lose by a gate that closes and gain by one that opens: the most
    wanted heads are tried, one by one, in the place of the least needed. What does
    not lower the loss is taken back.
    """
    order = gates.order()
    count, num_sure = (num_chosen(share, len(order)) for share in (BY_GATES, SURE))
    kept = order[:count]
    opened = _opened(kept, gates.value).to(model.device).requires_grad_()
    least = sum(_loss(model, reading, opened, policy) for reading in readings)
    assert opened.grad is not None, "each reading was gone back through"
    slope = opened.grad.cpu()
    wanted = sorted(order[count:], key=lambda head: float(slope[head]))
    needless = sorted(order[num_sure:count], key=lambda head: -float(slope[head]))
    for new in wanted[:TRIED]:
        if not needless or slope[new] >= slope[needless[0]]:
            break
        tried = [head for head in kept if head != needless[0]] + [new]
        retrieval = _opened(tried, gates.value).bool()
        loss = sum(reading.loss(model, policy, retrieval) for reading in readings)
        if loss < least:
            kept, least = tried, loss
            needless.pop(0)
    rest = [head for head in order if head not in kept]
    return scores.ranked(kept + rest, gates.measured, gates.layers)


def _opened(heads: list[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """Gates of 1 for these (layer, KV head), 0 for the others."""
    gates = torch.zeros_like(like)
    for head in heads:
        gates[head] = 1
    return gates


def _loss(model, reading: Reading, gates: torch.Tensor, policy: RetentionPolicy):
    """Loss of the answers in nats a token; the gates' gradient grows by its own."""
    whole: Any = contextlib.nullcontext()
    if not shared.is_shared(reading.cache):
        # Linear attention writes its states, which were read, in place.
        whole = torch.autograd.graph.allow_mutation_on_saved_tensors()
    with whole:
        logits = reading.logits(model, policy=policy, gates=gates)
        loss = cross_entropy(logits, reading.answers)
        loss.backward()
    return float(loss.detach())


def pressure(step: int, steps: int) -> float:
    """The weight of the mean gate in a step."""
    first, last = PRESSURE
    return first * (last / first) ** (step / max(1, steps - 1))
