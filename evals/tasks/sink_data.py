"""Data for the tasks: prose, lengths in tokens, natural words.

The harness imports each task's ``utils.py`` by its path, and that imports this module:
the harness must run where ``evals`` can be imported, as ``python -m lm_eval`` from the
repository's root.

Every ``custom_dataset`` function gets the task's ``metadata``, overlaid by the
arguments of the model and by ``--metadata``. Of these the functions here read

``tokenizer``, ``pretrained``, ``model``
    the tokenizer that lengths are counted in, the first that is given;
``text``
    where prose comes from (:func:`prose`);
``max_length``, ``max_model_len``, ``attention_backend``, ``additional_config``
    what the engine can take (:func:`check_lengths`).

No text is made of a repeated sentence: repeated tokens have no sink
(Gu et al., arXiv 2410.10781).
"""

from __future__ import annotations

import functools
import logging
import pydoc_data.topics
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

logger = logging.getLogger(__name__)


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Alice Oliver Clara Henry Martha Simon Laura Peter Emma George Nora Victor Julia "
    "Martin Helen Arthur Rosa Edward Lucy Walter Sarah David Anna Philip Grace Robert "
    "Susan Daniel Maria Thomas Ruth Albert Jane Samuel Diana Frank Alan Charles Karen "
    "Paul"
)


@functools.cache
def _load_tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def get_tokenizer(**settings: Any):
    """The tokenizer of the model that is evaluated.

    Raises:
        ValueError: None is named.
    """
    for key in ("tokenizer", "pretrained", "model"):
        if isinstance(settings.get(key), str):
            return _load_tokenizer(settings[key])
    raise ValueError(
        "tokenizer must be known to make texts of a given length, got neither "
        "tokenizer nor pretrained nor model; pass one in --model_args or --metadata"
    )


def count_tokens(tokenizer, text: str) -> int:
    """Tokens of ``text`` without the special ones."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)


@functools.cache
def _read_prose(source: str) -> str:
    if source == "pydoc":
        topics = pydoc_data.topics.topics
        return "\n\n".join(_paragraphs("\n\n".join(topics[n] for n in sorted(topics))))
    if source.startswith("hub:"):
        from datasets import load_dataset

        # Streamed: the first 32 documents, not the whole of PG19.
        rows = load_dataset(source[4:], split="test", streaming=True).take(32)
        return "\n\n".join(row["text"] for row in rows)
    path = Path(source).expanduser()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"text must be 'pydoc', 'hub:DATASET', a file or a folder of .txt files, "
            f"got {source!r}; correct the path in --metadata"
        )
    return "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files)


def _paragraphs(text: str) -> list[str]:
    """The paragraphs that are sentences: no tables, no code, no grammar."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        if len(words) >= 12 and letters >= 0.9 * len(paragraph):
            kept.append(" ".join(words))
    return kept


def prose(text: str = "pydoc", **_: Any) -> str:
    """Real English text.

    ``pydoc`` is the prose of the language reference that Python carries along (270,000
    characters in 3.11), ``hub:emozilla/pg19`` a dataset with a ``text`` column
    and a ``test`` split; else a file or a folder of ``.txt`` files, in order.
    """
    return _read_prose(text)


def word_ends(text: str) -> list[int]:
    """Offsets at which a word ends and white space follows."""
    return [match.end() for match in re.finditer(r"\S+(?=\s)", text)]


def fill(tokenizer, length: int, text: str, render) -> str:
    """``render(text[:c])`` of at most ``length`` tokens with the largest c.

    ``c`` ends a word, so what follows is tokenized as it would be elsewhere. The
    result misses ``length`` by less than the next word's tokens.

    Raises:
        ValueError: ``render`` of one word is too long, or ``text`` is too short.
    """
    # No tokenizer here makes more characters a token than this, on average; the
    # search need not tokenize the whole novel.
    text = text[: 12 * length + 100]
    ends = word_ends(text)
    low, high = 0, len(ends)  # ends[low] fits, ends[high] doesn't
    if count_tokens(tokenizer, render(text[: ends[0]])) > length:
        raise ValueError(
            f"lengths must leave room for the question, got {length} tokens; give a "
            "larger one"
        )
    # A guess from the first part saves most of the search's long texts.
    while high - low > 1:
        middle = (low + high) // 2
        if high == len(ends) and low == 0:
            middle = min(middle, max(1, length // 2))
        elif high == len(ends):
            middle = min(middle, 2 * low)
        if count_tokens(tokenizer, render(text[: ends[middle]])) <= length:
            low = middle
        else:
            high = middle
    if high == len(ends):
        raise ValueError(
            f"text must hold at least {length} tokens, got about "
            f"{count_tokens(tokenizer, text)}; give a longer one or smaller lengths"
        )
    return render(text[: ends[low]])


def passage(text: str, length: int, rng: random.Random) -> list[str]:
    """The words of a drawn part of ``text``, of at least ``length`` tokens.

    Raises:
        ValueError: ``text`` is too short.
    """
    ends = word_ends(text)
    # Enough left behind the start for any tokenizer with up to 12 characters a token.
    room = max(1, sum(end < len(text) - 12 * length for end in ends))
    words = text[ends[rng.randrange(room)] :][: 12 * length].split()
    if len(words) < length:
        raise ValueError(
            f"text must hold passages of {length} words, got {len(words)}; give a "
            "longer one or smaller lengths"
        )
    return words


def check_lengths(
    lengths: Sequence[int], num_generated: int = 1, **settings: Any
) -> None:
    """Refuse lengths that would be cut or would measure nothing.

    The harness cuts what doesn't fit the model's length, at the left and with no
    more than a warning: the sinks would be others and the text shorter.

    Args:
        lengths: Tokens of the prompts, special ones not counted.
        num_generated: Tokens that follow.
        settings: Metadata and arguments of the model.

    Raises:
        ValueError: The longest text does not fit, or none leaves the window.
    """
    longest = max(lengths)
    limit = settings.get("max_length") or settings.get("max_model_len")
    if limit is None and isinstance(settings.get("pretrained"), str):
        limit = _trained_length(settings["pretrained"])
    # One more for a special token that the tokenizer may put in front.
    if limit is not None and longest + num_generated + 1 > int(limit):
        raise ValueError(
            f"lengths must be at most max_model_len - {num_generated + 1}, got "
            f"{longest} with max_model_len {limit}; pass max_model_len="
            f"{longest + num_generated + 1} in --model_args (past the trained length "
            "with the hf_overrides that python -m vllm_sink.rotation.table_length "
            "MODEL LENGTH prints, too) or smaller lengths in --metadata"
        )
    if str(settings.get("attention_backend", "")).upper() == "SINK":
        from vllm_sink.policy.config import SinkConfig

        policy = SinkConfig.from_additional_config(
            settings.get("additional_config")
        ).policy
        if longest <= policy.budget:
            raise ValueError(
                f"lengths must exceed num_sink_tokens + window_size, got {longest} "
                f"with {policy.num_sink_tokens} + {policy.window_size}; nothing would "
                "ever be evicted: give longer ones in --metadata or a smaller "
                "window_size in additional_config"
            )


@functools.cache
def _trained_length(name: str) -> int | None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # a tokenizer alone, as in tests
        return None
    return getattr(config, "max_position_embeddings", None)


def first_word(text: str) -> str:
    """The first word of an answer, lower case, without punctuation."""
    match = re.search(r"\w+", text)
    return match.group().lower() if match else ""


def as_dataset(docs: list[dict[str, Any]]) -> dict[str, Dataset]:
    """Docs as a ``custom_dataset`` function returns them."""
    return {"test": Dataset.from_list(docs)}


def haystack(
    tokenizer,
    length: int,
    depth: int,
    text: str,
    *,
    needles: list[str],
    question: str,
    answer: str,
    rng: random.Random,
) -> dict[str, Any]:
    """A doc of at most ``length`` tokens: prose, needles in it, a question.

    Args:
        depth: Where ``needles[0]`` lies, in per cent of the prose; the others lie
            at depths drawn from ``rng``.
        text: Prose; a part is drawn from it.
    """
    ends = word_ends(text)
    # Enough left behind the start for any tokenizer with up to 12 characters a token.
    room = max(1, sum(end < len(text) - 12 * length for end in ends))
    text = text[ends[rng.randrange(room)] :].lstrip()
    places = [depth, *(rng.randrange(5, 95) for _ in needles[1:])]

    def render(part: str) -> str:
        spots = [_word_end_near(part, len(part) * place // 100) for place in places]
        order = sorted(range(len(needles)), key=lambda index: spots[index])
        pieces, start = [], 0
        for index in order:
            pieces += [part[start : spots[index]].strip(), needles[index]]
            start = spots[index]
        pieces += [part[start:].strip(), question]
        return "\n\n".join(piece for piece in pieces if piece)

    prompt = fill(tokenizer, length, text, render)
    before = prompt[: prompt.index(needles[0])]
    num_tokens = count_tokens(tokenizer, prompt)
    return {
        "prompt": prompt,
        "answer": answer,
        "length": length,
        "depth": depth,
        "num_tokens": num_tokens,
        "num_back": num_tokens - count_tokens(tokenizer, before),
    }


def _word_end_near(text: str, offset: int) -> int:
    """The first end of a word at or after ``offset``; 0 stays 0."""
    if offset == 0:
        return 0
    match = re.compile(r"(?<=\S)(?=\s|$)").search(text, offset)
    return match.start() if match else len(text)
