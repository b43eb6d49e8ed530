"""Real prose for the finder: a file, or Python's own reference.

The heads are scored on the first part of the text and the fraction is measured on the
rest: no token is in both.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

# The scores' share of the text; the rest is held out for the needles.
CALIBRATION_SHARE = 0.5
# No tokenizer makes more characters a token than this, on average.
CHARACTERS = 12


@dataclass(frozen=True)
class Text:
    """A text and what it is called in reports."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """The first 16 digits of its SHA-256."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:16]

    @property
    def calibration(self) -> str:
        """The part that heads are scored on."""
        return self.content[: int(len(self.content) * CALIBRATION_SHARE)]

    @property
    def held_out(self) -> str:
        """The part that needles are hidden in."""
        return self.content[int(len(self.content) * CALIBRATION_SHARE) :]


def read(path: Path | None) -> Text:
    """The file's text, or the prose of Python's own reference.

    Raises:
        ValueError: The file is unreadable, or no text.
    """
    if path is None:
        return Text("pydoc_data.topics", python_prose())
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--text must be a readable text file in UTF-8, got {str(path)!r} "
            f"({error}); give a file of prose"
        ) from None


def python_prose() -> str:
    """The paragraphs of Python's reference that are sentences (270,000 characters)."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    kept = []
    for paragraph in paragraphs:
        words = paragraph.split()
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        if len(words) >= 12 and letters >= 0.9 * len(paragraph):
            kept.append(" ".join(words))
    return "\n\n".join(kept)


def encode(tokenizer, text: str) -> list[int]:
    """The tokens of a text without the special ones."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def opening(tokenizer) -> list[int]:
    """The token that the model expects before a text: BOS, or none."""
    with_special = tokenizer("a").input_ids
    plain = encode(tokenizer, "a")
    start = len(with_special) - len(plain)
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if start > 0 and with_special[0] == bos else []


def passages(tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    """``count`` passages of ``length`` tokens, evenly spread over ``text``.

    Raises:
        ValueError: The text is too short for passages that don't overlap.
    """
    step = len(text) // count
    found = []
    for index in range(count):
        part = text[index * step : (index + 1) * step]
        start = _sentence_start(part, 0)
        tokens = encode(tokenizer, part[start : start + CHARACTERS * length])[:length]
        if len(tokens) < length:
            raise ValueError(
                f"--text must hold at least {2 * count * length} tokens, got passages "
                f"of {len(tokens)} where {length} are read; give a longer text"
            )
        found.append(tokens)
    return found


def words(text: str, length: int, rng: random.Random) -> list[str]:
    """The words of a drawn passage of at least ``length`` tokens.

    Raises:
        ValueError: The text is too short.
    """
    size = CHARACTERS * length
    start = _sentence_start(text, rng.randrange(max(1, len(text) - size)))
    found = text[start : start + size].split()
    if len(found) < length:
        raise ValueError(
            f"--text must hold passages of {length} words in each half, got one "
            f"of {len(found)}; give a longer text, or leave --text out"
        )
    return found


def _sentence_start(text: str, offset: int) -> int:
    match = re.compile(r"[.!?]\s+(?=[A-Z\"'])").search(text, offset)
    # The opening of a file is often no prose: its first sentence is skipped too.
    return match.end() if match else offset
