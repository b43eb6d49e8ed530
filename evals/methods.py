"""A comparison of scores of heads: the recipe, and DuoAttention's gates.

As ``evals.heads``: scores from Python's prose, needles in texts that neither saw, sink
positions ``absolute``, a row written when it is measured.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

from evals.heads import (
    LENGTHS,
    NUM_SINK_TOKENS,
    WINDOW,
    Rows,
    described,
    make_haystacks,
)
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import attention, duo, fraction, needles, scores, texts

METHODS = ("recipe", "duo")
FRACTIONS = (0.1, 0.25, 0.5)
NUM_HAYSTACKS = 6  # of eight needles


def measure(args: argparse.Namespace, path: Path) -> None:
    """Needles found and answer loss, by method and fraction."""
    model, tokenizer = attention.load(args.model, dtype="float32")
    text = texts.read(None)
    layers = attention.inspect(model, texts.encode(tokenizer, text.content[:200]))
    policy = RetentionPolicy(NUM_SINK_TOKENS, WINDOW)
    read = [texts.read(file) for file in args.texts]
    length = (args.lengths or LENGTHS)[0]
    haystacks = make_haystacks(tokenizer, read, length, args.haystacks or NUM_HAYSTACKS)

    @functools.cache
    def find(method: str) -> tuple[scores.Scores, float]:
        """Scores by one method, and the CPU seconds that they took."""
        start = time.process_time()
        if method == "recipe":
            found = scores.find(model, tokenizer, text.calibration, layers)
        else:
            found = duo.find(model, tokenizer, text.calibration, layers, policy, length)
        return found, time.process_time() - start

    @functools.cache
    def prefix(index: int):
        return needles.read_prefix(model, haystacks[index], policy)

    rows = Rows(path)
    for method in METHODS:
        for share in FRACTIONS:
            known = {
                **described(args, "; ".join(text.name for text in read)),
                "method": method,
                "steps": duo.STEPS if method == "duo" else "",
                "fraction": share,
                "length": length,
                "num_needles": len(haystacks) * needles.NUM_NEEDLES,
            }

            def cell(method=method, share=share) -> dict[str, Any]:
                found, seconds = find(method)
                heads = fraction.best_heads(found, share)
                answers = []
                for index, haystack in enumerate(haystacks):
                    answers += needles.ask(
                        model, haystack, policy, heads, prefix(index)
                    )
                loss = sum(answer.loss for answer in answers) / len(answers)
                return {
                    "hits": sum(answer.hit for answer in answers),
                    "answer_loss": round(loss, 4),
                    "cpu_seconds_to_find": round(seconds, 1),
                }

            rows.add(known, cell)
