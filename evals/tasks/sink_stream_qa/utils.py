"""StreamEval (StreamingLLM, arXiv 2309.17453, section 4.4) in natural words.

A stream of prose with facts in it; now and then one of them is recalled, with its
answer in the stream. Each doc is the stream up to one such question. No fact is
recalled twice: what is asked for stands in the stream once.
"""

import random
from dataclasses import dataclass
from typing import Any

from evals.tasks import sink_data
from vllm_sink.tools.heads.needles import Needle, draw_needles

MOST_FACTS = 16  # no fruit, person or city twice


@dataclass(frozen=True)
class Line:
    """A fact as a line of the stream, and its tokens with the breaks around it."""

    fact: Needle
    num_tokens: int


@dataclass(frozen=True)
class Event:
    """A fact or a question at a token of the stream.

    Args:
        distance: 0 where the fact is told; else it is recalled, so far from there.
    """

    token: int
    line: Line
    distance: int


def documents(
    lengths: list[int],
    distances: list[int],
    num_samples: int = 1,
    num_queries: int = 2,
    num_facts: int = 8,
    data_seed: int = 0,
    max_gen_toks: int = 8,
    **settings: Any,
) -> dict[str, Any]:
    """Questions about facts ``distances`` tokens back.

    Args:
        lengths: Tokens of the stream; the largest is used.
        distances: Tokens from the start of a fact to the end of its question.
        num_samples: Streams.
        num_queries: Questions for each distance in each stream.
        num_facts: Facts in a stream, at most 16; those that are not asked for are
            distractors.

    Each doc: ``prompt``, ``answer``, ``distance`` as asked, ``num_back`` the true
    one, ``kind`` of the fact, ``num_tokens`` of the prompt.
    """
    length = max(lengths)
    asked = [distance for distance in distances for _ in range(num_queries)]
    if not len(asked) <= num_facts <= MOST_FACTS:
        raise ValueError(
            f"num_facts must be from {len(asked)}, the questions of a stream, to "
            f"{MOST_FACTS}, got {num_facts}; correct --metadata"
        )
    sink_data.check_lengths([length], max_gen_toks, **settings)
    tokenizer = sink_data.get_tokenizer(**settings)
    text = sink_data.prose(**settings)
    docs = []
    for index in range(num_samples):
        rng = random.Random(f"stream {data_seed} {length} {index}")
        rng.shuffle(asked)
        lines = [
            Line(fact, sink_data.count_tokens(tokenizer, f"\n\n{fact.sentence}\n\n"))
            for fact in rng.sample(draw_needles(rng, num_facts), num_facts)
        ]
        events = _plan(rng, asked, lines, length)
        docs += _stream(tokenizer, sink_data.passage(text, length, rng), events)
    return sink_data.as_dataset(docs)


def _plan(
    rng: random.Random, asked: list[int], lines: list[Line], length: int
) -> list[Event]:
    """The events of a stream, in its order.

    Questions lie evenly behind the largest distance; facts so far before them, moved
    where they would touch; distractors are drawn. No two are nearer than a line.
    """
    size = max(line.num_tokens for line in lines)
    first = max(asked) + size
    step = (length - first) // len(asked)
    if step < size * len(lines) // len(asked) + size:
        raise ValueError(
            f"distances must leave room for {len(asked)} questions in {length} tokens, "
            f"got {max(asked)}; raise lengths to "
            f"{first + (len(lines) + len(asked) + 1) * size} or lower num_queries"
        )
    questions = [
        Event(first + step * (place + 1) - size, line, distance)
        for place, (line, distance) in enumerate(zip(lines, asked, strict=False))
    ]
    events = list(questions)

    def tell(line: Line, wanted: int, end: int) -> None:
        free = (
            token
            for token in range(end - size + 1)
            if all(abs(token - event.token) >= size for event in events)
        )
        events.append(Event(min(free, key=lambda token: abs(token - wanted)), line, 0))

    for event in questions:
        tell(event.line, event.token + size - event.distance, event.token)
    for line in lines[len(asked) :]:
        tell(line, rng.randrange(length - size), length - size)
    return sorted(events, key=lambda event: event.token)


def _stream(tokenizer, words: list[str], events: list[Event]) -> list[dict[str, Any]]:
    """The docs: the stream up to each question."""
    stream, size, start, docs = "", 0, 0, []
    told: dict[Needle, int] = {}  # where in the stream
    for event in events:
        stop = start
        # Counted alone a word has no fewer tokens than in its sentence.
        while size + (more := sink_data.count_tokens(tokenizer, f" {words[stop]}")) <= (
            event.token
        ):
            size += more
            stop += 1
        stream += " ".join(words[start:stop])
        start, fact = stop, event.line.fact
        if event.distance:
            prompt = f"{stream}\n\n{fact.question}"
            docs.append(
                {
                    "prompt": prompt,
                    "answer": fact.answer.strip(),
                    "kind": fact.kind,
                    "distance": event.distance,
                    "num_back": sink_data.count_tokens(tokenizer, prompt[told[fact] :]),
                    "num_tokens": sink_data.count_tokens(tokenizer, prompt),
                }
            )
        told.setdefault(fact, len(stream))
        stream += f"\n\n{fact.sentence}\n\n"
        size = sink_data.count_tokens(tokenizer, stream)
    return docs


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the first word is the answer."""
    right = float(sink_data.first_word(results[0]) == doc["answer"])
    return {"acc": right, f"acc_back_{doc['distance']}": right}
