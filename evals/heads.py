"""Measurements of retrieval heads: needles, perplexity, stability of scores.

Measured on the Hugging Face model with a mask for every KV head (sink positions
``absolute``), so any map can be tried without an engine; ``heads_engine`` generates
through vLLM instead, with both sink positions. The heads are found on Python's own
prose, by the recipe; ``heads_engine`` takes the trained gates, too, and all methods
are in ``evals.methods``. The finder never sees the texts. Each row is written when it
is measured: started again, a run goes on.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evals.policies import Policy
from vllm_sink.policy.head_map import num_chosen
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import (
    answers,
    attention,
    fraction,
    needles,
    pattern,
    scores,
    texts,
)

NUM_SINK_TOKENS, WINDOW = 4, 252
LENGTHS = (512, 1024, 2048)
NUM_HAYSTACKS = 13  # of eight needles: 104 samples a cell
FRACTIONS = (0.0, 0.25, 0.5, 0.1, 0.33)
BASELINES = (0.25, 0.5)
SCORED_FROM, SCORED_TO = 512, 2048  # tokens of each text for the perplexity


def choices(found: scores.Scores) -> list[tuple[str, float, torch.Tensor | None]]:
    """(how the heads were chosen, fraction, [L, HKV] bool or None for all)."""
    rows: list[tuple[str, float, torch.Tensor | None]] = [("found", 1.0, None)]
    rows += [("found", f, fraction.best_heads(found, f)) for f in FRACTIONS]
    rows += [("whole layers", f, best_layers(found, f)) for f in BASELINES]
    rows += [("random", f, random_heads(found, f)) for f in BASELINES]
    return rows


def random_heads(found: scores.Scores, share: float, seed: int = 0) -> torch.Tensor:
    """[L, HKV] bool: as many heads, drawn."""
    order = found.order()
    random.Random(f"random heads {seed}").shuffle(order)
    kept = torch.zeros_like(found.value, dtype=torch.bool)
    for layer, head in order[: num_chosen(share, len(order))]:
        kept[layer, head] = True
    return kept


def best_layers(found: scores.Scores, share: float) -> torch.Tensor:
    """[L, HKV] bool: whole layers, the best by their mean score."""
    layers = sorted(found.layers.full, key=lambda i: -float(found.value[i].mean()))
    kept = torch.zeros_like(found.value, dtype=torch.bool)
    kept[layers[: num_chosen(share, len(layers))]] = True
    return kept


def kv_share(share: float, length: int) -> float:
    """KV memory of a request of ``length`` tokens against full attention's."""
    return share + (1 - share) * min(1, (NUM_SINK_TOKENS + WINDOW) / length)


class Rows:
    """A CSV that grows row by row, known by the columns before the measured ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def add(self, known: dict[str, Any], measure: Callable[[], dict]) -> None:
        """Measure a row, unless one with these columns is there."""
        texts_of = {key: str(value) for key, value in known.items()}
        if any(texts_of.items() <= row.items() for row in self.rows):
            return
        start = time.perf_counter()
        row = {**texts_of, **measure()}
        print(row, f"{time.perf_counter() - start:.0f} s", flush=True)
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)


# (method of the scores, policy)
ENGINE_POLICIES = (
    ("", "dense"),
    *(("", f"sink:4+252:{positions}") for positions in ("cache", "absolute")),
    *(
        (method, f"heads:FILE@{share}:4+252:{positions}")
        for method, share in (
            ("answers", 0.1),
            ("answers", 0.25),
            ("recipe", 0.1),
            ("recipe", 0.25),
            ("recipe", 0.5),
        )
        for positions in ("cache", "absolute")
    ),
)


def hits_in_engine(model: str, policy: Policy, haystacks: list, length: int) -> int:
    """Needles found by greedy generation in vLLM; haystacks have ``length`` tokens."""
    with policy.open_engine(model, length + 16) as llm:
        return generated_hits(llm, haystacks)


def generated_hits(llm, haystacks: list) -> int:
    """Needles that the engine finds by greedy generation."""
    from vllm import SamplingParams

    prompts, params, wanted = [], [], []
    for haystack in haystacks:
        for question in haystack.questions:
            count = question.num_answer
            tokens = haystack.tokens + question.tokens[:-count]
            prompts.append({"prompt_token_ids": tokens})
            params.append(SamplingParams(temperature=0, max_tokens=count))
            wanted.append(question.tokens[-count:])
    outputs = llm.generate(prompts, params, use_tqdm=False)
    told = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(a == b for a, b in zip(told, wanted, strict=True))


def measure_engine(args: argparse.Namespace, path: Path) -> None:
    """Needles found by greedy generation in vLLM, by policy and sink positions."""
    # GiB on a CPU: else nearly all memory, which a busy machine hasn't.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model, tokenizer, found = found_heads(args)
    streaming = RetentionPolicy(NUM_SINK_TOKENS, WINDOW)
    length = (args.lengths or LENGTHS)[0]
    text = texts.read(None).calibration
    trained = answers.find(model, tokenizer, text, found.layers, streaming, length)
    by_method = {"recipe": found, "answers": trained}
    del model
    read = [texts.read(file) for file in args.texts]
    haystacks = make_haystacks(tokenizer, read, length, args.haystacks or NUM_HAYSTACKS)
    rows = Rows(path)
    with tempfile.TemporaryDirectory() as folder:
        for method, scored in by_method.items():
            pattern.write(Path(folder) / f"{method}.tsv", scored.value, {})
        for method, name in ENGINE_POLICIES:
            file = Path(folder) / f"{method}.tsv"
            policy = Policy.parse(name.replace("FILE", str(file)), 4, 252)
            known = {
                **described(args, "; ".join(text.name for text in read)),
                "method": method,
                "policy": name.replace("heads:FILE", "heads"),
                "length": length,
                "num_needles": len(haystacks) * needles.NUM_NEEDLES,
            }

            def measure(policy=policy) -> dict[str, Any]:
                return {"hits": hits_in_engine(args.model, policy, haystacks, length)}

            rows.add(known, measure)


def found_heads(args: argparse.Namespace):
    """(model, tokenizer, scores on Python's prose)."""
    model, tokenizer = attention.load(args.model, dtype="float32")
    text = texts.read(None)
    layers = attention.inspect(model, texts.encode(tokenizer, text.content[:200]))
    return model, tokenizer, scores.find(model, tokenizer, text.calibration, layers)


def make_haystacks(tokenizer, read: list, length: int, count: int) -> list:
    """``count`` haystacks of ``length`` tokens, of the texts in turn."""
    return [
        needles.make(
            tokenizer, read[i % len(read)].content, length, WINDOW, f"test {i}"
        )
        for i in range(count)
    ]


def described(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """Columns that every CSV of heads has."""
    return {
        "model": Path(args.model).name,
        "heads_from": "pydoc_data.topics",
        "texts": names,
        "dtype": "float32",
        "num_sink_tokens": NUM_SINK_TOKENS,
        "window_size": WINDOW,
    }


def measure_needles(args: argparse.Namespace, path: Path) -> None:
    """Needles found and answer loss, by policy and length."""
    model, tokenizer, found = found_heads(args)
    read = [texts.read(file) for file in args.texts]
    policy = RetentionPolicy(NUM_SINK_TOKENS, WINDOW)
    rows = Rows(path)
    haystacks = {
        length: make_haystacks(tokenizer, read, length, args.haystacks or NUM_HAYSTACKS)
        for length in args.lengths or LENGTHS
    }
    table = [(length, *choice) for length in haystacks for choice in choices(found)]
    prefixes: dict[Any, Any] = {}
    # Cheap and telling rows first, should it be stopped: a baseline's turn comes after
    # the found heads' at twice its length.
    table.sort(key=lambda row: row[0] * (1 if row[1] == "found" else 2.5))
    for length, how, share, heads in table:
        known = {
            **described(args, "; ".join(text.name for text in read)),
            "heads": how,
            "fraction": share,
            "num_retrieval_heads": (
                found.layers.num_heads if heads is None else int(heads.sum())
            ),
            "length": length,
            "num_needles": len(haystacks[length]) * needles.NUM_NEEDLES,
            "kv_share": round(kv_share(share, length), 4),
        }

        def measure(length=length, heads=heads) -> dict[str, Any]:
            used = None if heads is None else policy
            told = []
            for haystack in haystacks[length]:
                key = (length, tuple(haystack.tokens[:64]))
                if key not in prefixes:
                    prefixes[key] = needles.read_prefix(model, haystack, policy)
                told += needles.ask(model, haystack, used, heads, prefixes[key])
            loss = sum(answer.loss for answer in told) / len(told)
            hits = sum(answer.hit for answer in told)
            return {"hits": hits, "answer_loss": round(loss, 4)}

        rows.add(known, measure)


@torch.inference_mode()
def measure_perplexity(args: argparse.Namespace, path: Path) -> None:
    """Mean negative log-probability of tokens 512 to 2,047 of each text."""
    model, tokenizer, found = found_heads(args)
    policy = RetentionPolicy(NUM_SINK_TOKENS, WINDOW)
    rows = Rows(path)
    for file in args.texts:
        text = texts.read(file)
        passage = texts.passages(tokenizer, text.content, 1, SCORED_TO)[0]
        tokens = torch.tensor([passage])
        for how, share, heads in choices(found):
            known = {
                **described(args, text.name),
                "heads": how,
                "fraction": share,
                "first_token": SCORED_FROM,
                "num_scored": SCORED_TO - SCORED_FROM,
            }

            def measure(heads=heads, tokens=tokens) -> dict[str, Any]:
                used = None if heads is None else policy
                with attention.Headwise(policy=used, retrieval=heads):
                    logits = model(tokens, use_cache=False).logits[0]
                nll = torch.nn.functional.cross_entropy(
                    logits[SCORED_FROM - 1 : -1], tokens[0, SCORED_FROM:]
                )
                return {
                    "mean_nll": round(float(nll), 5),
                    "perplexity": round(math.exp(float(nll)), 3),
                }

            rows.add(known, measure)


def measure_stability(args: argparse.Namespace, path: Path) -> None:
    """Rank correlation and overlap of the best heads between texts."""
    model, tokenizer, first = found_heads(args)
    layers = first.layers
    found = {"pydoc_data.topics": first}
    for file in args.texts:
        text = texts.read(file)
        found[text.name] = scores.find(model, tokenizer, text.calibration, layers)
    rows = Rows(path)
    names = list(found)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            a, b = found[one], found[other]
            known = {"model": Path(args.model).name, "one": one, "other": other}

            def measure(a=a, b=b) -> dict[str, Any]:
                overlap = {}
                for share in (0.1, 0.25, 0.5):
                    mine, theirs = (fraction.best_heads(x, share) for x in (a, b))
                    same = int((mine & theirs).sum()) / int(mine.sum())
                    overlap[f"overlap_{share}"] = round(same, 3)
                correlation = scores.rank_correlation(a.value, b.value)
                return {"rank_correlation": round(correlation, 4), **overlap}

            rows.add(known, measure)
