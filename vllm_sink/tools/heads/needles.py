"""Needles in prose, and whether a model finds them.

A haystack holds eight short needles, four favourite fruits and four five-digit codes:
each is a distractor of the others. All lie beyond the window of the question. Answers
are teacher-forced: the loss is that of the answer's tokens, a hit is an answer all of
whose tokens are the most likely ones. The haystack is read once for its eight
questions.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import shared, texts
from vllm_sink.tools.heads.attention import NAME, Headwise

NUM_NEEDLES = 8
NO_TARGET = -100  # what cross_entropy leaves out


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Alice Oliver Clara Henry Martha Simon Laura Peter George Nora Victor Julia Martin "
    "Helen Arthur Rosa Edward Lucy Walter Sarah David Anna Philip Grace Robert Susan"
)
SURNAMES = _words(
    "Brown Carter Fisher Mason Palmer Turner Walker Weaver Baker Cooper Hunter Porter "
    "Miller Taylor Gardner Shepherd"
)
FRUITS = _words(
    "apple mango cherry lemon peach plum grape melon banana orange pear fig olive "
    "apricot coconut pineapple"
)
CITIES = _words(
    "London Paris Berlin Madrid Rome Vienna Prague Moscow Cairo Tokyo Sydney Boston "
    "Chicago Dublin Athens Lisbon"
)


@dataclass(frozen=True)
class Needle:
    """A sentence, the question for it, and the answer with its leading space."""

    kind: str
    sentence: str
    question: str
    answer: str


def draw_needles(rng: random.Random, count: int = NUM_NEEDLES) -> list[Needle]:
    """Draw needles, fruits and codes in turn; no person, fruit or city twice."""
    people = zip(rng.sample(NAMES, count), rng.sample(SURNAMES, count), strict=True)
    fruits, cities = rng.sample(FRUITS, count), rng.sample(CITIES, count)
    needles = []
    for index, (first, last) in enumerate(people):
        if index % 2 == 0:
            question = f"The favourite fruit of {first} {last} is"
            kind, answer = "fruit", f" {fruits[index]}"
        else:
            question = f"The code for {cities[index]} is"
            kind, answer = "code", f" {rng.randrange(10_000, 100_000)}"
        needles.append(Needle(kind, f"{question}{answer}.", question, answer))
    return needles


@dataclass(frozen=True)
class Question:
    """Tokens that follow the haystack, and those of them that are the answer."""

    needle: Needle
    tokens: list[int]
    num_answer: int


@dataclass(frozen=True)
class Haystack:
    """Prose with needles in it; each question follows it by itself."""

    tokens: list[int]
    questions: list[Question]


def make(tokenizer, text: str, length: int, window: int, seed: str | int) -> Haystack:
    """A haystack that is ``length`` tokens with its longest question.

    Args:
        window: No question sees a needle through a window of so many tokens.
        seed: Of the passage and the needles; equal seeds give equal haystacks.

    Raises:
        ValueError: No room for the needles, or too short a text.
    """
    rng = random.Random(f"needles {seed} {length}")
    needles = draw_needles(rng)
    questions = [_question(tokenizer, needle) for needle in needles]
    encoded = [texts.encode(tokenizer, f"\n\n{n.sentence}\n\n") for n in needles]
    num_prompt = length - max(len(question.tokens) for question in questions)
    room = num_prompt - window - sum(map(len, encoded))
    if room < NUM_NEEDLES:
        least = length + NUM_NEEDLES - room
        raise ValueError(
            f"--needle-tokens must be at least {least} with --window-size {window}, got"
            f" {length}; needles inside the window prove nothing: give a larger one or "
            "a smaller --window-size"
        )
    words = texts.words(text, length, rng)
    # Counted alone a word has no fewer tokens than in its sentence.
    sizes = [len(texts.encode(tokenizer, f" {word}")) for word in words[:num_prompt]]
    tokens, start, read = texts.opening(tokenizer), 0, 0
    for index, needle in enumerate(encoded, start=1):
        stop = start
        while read + sizes[stop] <= room * index / (NUM_NEEDLES + 1):
            read += sizes[stop]
            stop += 1
        tokens += texts.encode(tokenizer, " ".join(words[start:stop])) + needle
        start = stop
    assert len(tokens) <= num_prompt - window + 1, "no needle is in the window"
    tokens += texts.encode(tokenizer, " ".join(words[start:]))
    assert len(tokens) >= num_prompt, "the passage is long enough"
    return Haystack(tokens[:num_prompt], questions)


def _question(tokenizer, needle: Needle) -> Question:
    """The tokens of a needle's question, and those of them that are the answer."""
    asked = texts.encode(tokenizer, f"\n\n{needle.question}")
    whole = texts.encode(tokenizer, f"\n\n{needle.question}{needle.answer}")
    common = 0
    while common < len(asked) and asked[common] == whole[common]:
        common += 1
    return Question(needle, whole, len(whole) - common)


def batch(haystack: Haystack, device) -> tuple[torch.Tensor, torch.Tensor]:
    """All questions with their answers, and what each of their tokens foretells.

    Returns:
        Tokens [Q, longest], padded on the right: no query that counts can see it. And
        as many targets: the next token where it is the answer's, else ``NO_TARGET``.
    """
    questions = haystack.questions
    longest = max(len(question.tokens) for question in questions)
    rows = [q.tokens + [q.tokens[-1]] * (longest - len(q.tokens)) for q in questions]
    tokens = torch.tensor(rows, device=device)
    targets = torch.full_like(tokens, NO_TARGET)
    for index, question in enumerate(questions):
        end = len(question.tokens) - 1
        start = end - question.num_answer
        targets[index, start:end] = tokens[index, start + 1 : end + 1]
    return tokens, targets


def answer_logits(
    model, cache, rows: torch.Tensor, targets: torch.Tensor, **headwise: Any
) -> torch.Tensor:
    """[answer tokens, vocabulary]: what the model expects in each token's place.

    Args:
        cache: Transformers', of the haystack; left as it is.
        rows, targets: :func:`batch`'s.
        headwise: In force for the questions: what ``Headwise`` takes.
    """
    ours = getattr(model.config, "_attn_implementation", None) == NAME
    continued, past = shared.continued(cache, len(rows), share=ours)
    with Headwise(**headwise, past=past):
        # Whole: logits_to_keep makes a matrix for each row of what is one.
        logits = model(rows, past_key_values=continued, use_cache=True).logits
    return logits[targets != NO_TARGET].float()


@dataclass(frozen=True)
class Answer:
    """Loss in nats a token of the answer, and whether every token was the argmax."""

    kind: str
    loss: float
    hit: bool


@torch.inference_mode()
def read_prefix(model, haystack: Haystack, policy: RetentionPolicy):
    """Transformers' cache of the first S + W tokens: the same for every head map.

    Within the budget every head sees everything, so a curve reads these tokens once.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([haystack.tokens[: policy.budget]], device=model.device)
    model.base_model(tokens, past_key_values=cache, use_cache=True)
    return cache


@torch.inference_mode()
def ask(
    model,
    haystack: Haystack,
    policy: RetentionPolicy | None = None,
    retrieval: torch.Tensor | None = None,
    prefix=None,
) -> list[Answer]:
    """The model's answers, in the order of the needles.

    Args:
        policy: Of the streaming heads; None is full attention everywhere.
        retrieval: [L, HKV] bool, the heads that keep everything.
        prefix: :func:`read_prefix` of this haystack; left as it is.
    """
    from transformers import DynamicCache

    cache = copy.deepcopy(prefix) or DynamicCache(config=model.config)
    how: dict[str, Any] = {"policy": policy, "retrieval": retrieval}
    rest = haystack.tokens[cache.get_seq_length() :]
    with Headwise(**how):
        prompt = torch.tensor([rest], device=model.device)
        model.base_model(prompt, past_key_values=cache, use_cache=True)
    rows, targets = batch(haystack, model.device)
    logits = answer_logits(model, cache, rows, targets, **how)
    return list(answers_of(haystack, logits, targets))


def answers_of(
    haystack: Haystack, logits: torch.Tensor, targets: torch.Tensor
) -> Iterator[Answer]:
    """The answers that :func:`answer_logits` are of."""
    answers = targets[targets != NO_TARGET]
    scores = torch.log_softmax(logits, dim=-1)
    losses = -scores.gather(1, answers[:, None])[:, 0]
    right = scores.argmax(-1) == answers
    sizes = (targets != NO_TARGET).sum(1).tolist()
    parts = zip(losses.split(sizes), right.split(sizes), strict=True)
    for (loss, hit), question in zip(parts, haystack.questions, strict=True):
        yield Answer(question.needle.kind, float(loss.mean()), bool(hit.all()))
