"""A comparison of scores of heads: those of ``vllm-sink heads``, and others.

As ``evals.heads``: scores from Python's prose, needles in texts that none of them saw,
sink positions ``absolute``, a row written when it is measured.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evals import head_scores
from evals.heads import (
    NUM_HAYSTACKS,
    NUM_SINK_TOKENS,
    WINDOW,
    Rows,
    described,
    make_haystacks,
)
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import answers, attention, duo, fraction, needles, texts
from vllm_sink.tools.heads import scores as recipe

FRACTIONS = (0.1, 0.25, 0.5)
LENGTHS = (512, 1024)
FOUND_AT = 512  # tokens of the haystacks that scores are found on, where they are

# By name, the most telling first: a run may be stopped.
METHODS: dict[str, Callable[..., recipe.Scores]] = {
    "answers": answers.find,
    "recipe": lambda m, t, text, layers, *_: recipe.find(m, t, text, layers),
    "repeat": lambda m, t, text, layers, *_: head_scores.repeat(m, t, text, layers),
    "duo": duo.find,
}
STEPS = {"answers": answers.STEPS, "duo": duo.STEPS}


def measure(args: argparse.Namespace, path: Path) -> None:
    """Needles found and answer loss, by method and fraction; and full attention's."""
    model, tokenizer = attention.load(args.model, dtype="float32")
    text = texts.read(None)
    layers = attention.inspect(model, texts.encode(tokenizer, text.content[:200]))
    policy = RetentionPolicy(NUM_SINK_TOKENS, WINDOW)
    read = [texts.read(file) for file in args.texts]
    haystacks = {
        length: make_haystacks(tokenizer, read, length, args.haystacks or NUM_HAYSTACKS)
        for length in args.lengths or LENGTHS
    }

    @functools.cache
    def find(method: str) -> tuple[recipe.Scores, float]:
        """Scores by one method, and the CPU seconds that they took."""
        start = time.process_time()
        found = METHODS[method](
            model, tokenizer, text.calibration, layers, policy, FOUND_AT
        )
        return found, time.process_time() - start

    @functools.cache
    def prefix(length: int, index: int):
        return needles.read_prefix(model, haystacks[length][index], policy)

    rows = Rows(path)
    cells = [
        (method, share, length)
        for method in args.methods
        for share in FRACTIONS
        for length in haystacks
    ]
    cells += [("full attention", 1.0, length) for length in haystacks]
    # Half of the heads tells the methods least apart.
    for method, share, length in sorted(cells, key=lambda cell: cell[1] == 0.5):
        known = {
            **described(args, "; ".join(text.name for text in read)),
            "method": method,
            "steps": STEPS.get(method, ""),
            "fraction": share,
            "length": length,
            "num_needles": len(haystacks[length]) * needles.NUM_NEEDLES,
        }

        def cell(method=method, share=share, length=length) -> dict[str, Any]:
            heads, seconds = None, 0.0
            if method in METHODS:
                found, seconds = find(method)
                heads = fraction.best_heads(found, share)
            used = None if heads is None else policy
            told = []
            for index, haystack in enumerate(haystacks[length]):
                told += needles.ask(model, haystack, used, heads, prefix(length, index))
            loss = sum(answer.loss for answer in told) / len(told)
            return {
                "hits": sum(answer.hit for answer in told),
                "answer_loss": round(loss, 4),
                "cpu_seconds_to_find": round(seconds, 1),
            }

        rows.add(known, cell)
