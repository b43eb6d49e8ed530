"""StreamEval (StreamingLLM, arXiv 2309.17453, section 4.4) in natural words.

A stream of prose with facts in it; every few facts one of some lines ago is recalled,
with its answer in the stream. Each doc is the stream up to one such question. No fact
is recalled twice: what is asked for stands in the stream once.
"""

import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import sink_data


def documents(
    lengths: list[int],
    distances: list[int],
    num_samples: int = 1,
    num_queries: int = 8,
    query_every: int = 4,
    prose_tokens: int = 48,
    data_seed: int = 0,
    max_gen_toks: int = 8,
    **settings: Any,
) -> dict[str, Any]:
    """Questions about facts ``distances`` tokens back.

    Args:
        lengths: Tokens of the stream; the largest is used.
        distances: Tokens from a fact's line to the end of the question.
        num_samples: Streams.
        num_queries: Questions for each distance in each stream, all near its end.
        query_every: Facts from one question to the next.
        prose_tokens: Tokens of prose before each fact, at most; 0: facts alone, which
            small models can't keep apart.

    Each doc: ``prompt``, ``answer``, ``distance`` as asked, ``num_back`` the true
    one, ``num_tokens`` of the prompt.
    """
    length = max(lengths)
    if max(distances) >= length:
        raise ValueError(
            f"distances must be below the stream's {length} tokens, got "
            f"{max(distances)}; raise lengths or drop it"
        )
    sink_data.check_lengths([length], max_gen_toks, **settings)
    tokenizer = sink_data.get_tokenizer(**settings)
    text = sink_data.prose(**settings) if prose_tokens else ""
    docs = []
    for index in range(num_samples):
        rng = random.Random(f"stream {data_seed} {index}")
        prose = _prose_lines(tokenizer, rng, length, prose_tokens, text)
        docs += _stream(
            tokenizer, rng, length, distances, num_queries, query_every, prose
        )
    return sink_data.as_dataset(docs)


def _prose_lines(tokenizer, rng, length, prose_tokens, text) -> list[str]:
    """Lines of at most ``prose_tokens`` tokens, as many as a stream may need."""
    if prose_tokens == 0:
        return [""] * length
    room = max(1, len(text) - 12 * length)
    words = text[rng.randrange(room) :][: 12 * length].split()[1:]
    lines, line, size = [], [], 1
    for word in words:
        more = sink_data.count_tokens(tokenizer, f" {word}")
        if size + more > prose_tokens and line:
            lines.append(" ".join(line) + "\n")
            line, size = [], 1
        line.append(word)
        size += more
    return lines


def _stream(
    tokenizer, rng, length, distances, num_queries, query_every, prose
) -> list[dict]:
    # Facts are at least 4 tokens a line: more than enough, cut below.
    pairs = sink_data.facts(rng, min(length // 4 + 8, 1800))
    asked = [distance for distance in distances for _ in range(num_queries)]
    rng.shuffle(asked)
    # Two passes: the first finds how many lines fit, the second asks near the end.
    lines = _lines(tokenizer, pairs, query_every, [], length, prose)[0]
    num_slots = sum(line.startswith("Recall") for line in lines)
    if num_slots < len(asked) + max(distances) * num_slots // length:
        raise ValueError(
            f"num_queries must leave max(distances) = {max(distances)} tokens before "
            f"the first question, got {num_queries} for each of {len(distances)} "
            f"distances in {length} tokens; lower it or raise lengths"
        )
    first_slot = num_slots - len(asked)
    return _lines(tokenizer, pairs, query_every, asked, length, prose, first_slot)[1]


def _lines(tokenizer, pairs, query_every, asked, length, prose, first_slot=0):
    """The stream's lines, and a doc for each of ``asked`` from ``first_slot`` on."""
    lines, ends, docs = [], [0], []  # ends[i]: tokens before line i
    known: list[tuple[int, str, str]] = []  # line, thing, owner

    def add(line: str) -> None:
        lines.append(line)
        ends.append(ends[-1] + sink_data.count_tokens(tokenizer, line))

    slot = 0
    for number, (thing, owner) in enumerate(pairs[: len(prose)], start=1):
        if prose[number - 1]:
            add(prose[number - 1])
        known.append((len(lines), thing, owner))
        add(f"The {thing} belongs to {owner}.\n")
        if number % query_every:
            continue
        which = slot - first_slot
        want = asked[which] if 0 <= which < len(asked) else 64
        here = ends[-1] + 8  # the question itself is about 8 tokens
        fact = min(known, key=lambda fact: abs(here - ends[fact[0]] - want))
        known.remove(fact)
        line, thing, owner = fact
        question = f"Recall: the {thing} belongs to"
        if asked and 0 <= which < len(asked):
            prompt = "".join(lines) + question
            num_tokens = sink_data.count_tokens(tokenizer, prompt)
            docs.append(
                {
                    "prompt": prompt,
                    "answer": owner,
                    "distance": want,
                    "num_back": num_tokens - ends[line],
                    "num_tokens": num_tokens,
                }
            )
        add(f"{question} {owner}.\n")
        if ends[-1] > length:
            del lines[-1]
            break
        slot += 1
    return lines, docs


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the first word is the owner."""
    right = float(sink_data.first_word(results[0]) == doc["answer"].lower())
    return {"acc": right, f"acc_back_{doc['distance']}": right}
