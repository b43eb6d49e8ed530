"""Whole layers that keep everything, on a model that has few with full attention.

As ``evals.heads``: the Hugging Face model with a mask for every KV head, sink positions
``absolute``, a row written when it is measured. Layers with a window of their own keep
it, so needles are hidden beyond it, too. ``heads_layers_engine`` asks an engine of vLLM
instead, with both sink positions.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch

from evals.heads import (
    NUM_SINK_TOKENS,
    SCORED_FROM,
    SCORED_TO,
    WINDOW,
    Rows,
    generated_hits,
)
from evals.policies import Policy
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import attention, needles, texts

MOST_LAYERS = 4  # with full attention: all their subsets are tried
LENGTHS = (1024, 2048)
NUM_HAYSTACKS = 6  # of eight needles
CHUNK = 256  # tokens whose logits an engine holds at once: the vocabulary may be large


def subsets(full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every choice of these layers: all, none, then the larger first.

    Raises:
        ValueError: There are too many.
    """
    if len(full) > MOST_LAYERS:
        raise ValueError(
            f"--model must have at most {MOST_LAYERS} layers with full attention, got "
            f"{len(full)}; try heads instead"
        )
    sizes = [len(full), 0, *range(len(full) - 1, 0, -1)]
    return [part for size in sizes for part in itertools.combinations(full, size)]


def own_window(model) -> int:
    """The window of the layers that have one, 0 if none has."""
    return getattr(model.config.get_text_config(), "sliding_window", None) or 0


def measure(args: argparse.Namespace, path: Path) -> None:
    """Needles found, answer loss and perplexity, by the layers that keep everything."""
    model, tokenizer = attention.load(args.model, dtype="float32")
    read = [texts.read(file) for file in args.texts]
    sample = texts.encode(tokenizer, read[0].content[:200])
    layers = attention.inspect(model, sample)
    hidden_by = max(WINDOW, own_window(model))
    policy = RetentionPolicy(NUM_SINK_TOKENS, WINDOW)
    rows = Rows(path)
    haystacks = make_haystacks(args, tokenizer, read, hidden_by)
    passages = make_passages(tokenizer, read)
    for chosen in subsets(layers.full):
        kept = torch.zeros(layers.num_layers, layers.num_kv_heads, dtype=torch.bool)
        kept[list(chosen)] = True
        known = {
            **described(args, read, own_window(model), layers.full),
            "retrieval_layers": " ".join(map(str, chosen)),
        }

        def cells(kept=kept) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for length, made in haystacks.items():
                answers = [a for h in made for a in needles.ask(model, h, policy, kept)]
                loss = sum(answer.loss for answer in answers) / len(answers)
                found[f"num_needles_{length}"] = len(answers)
                found[f"hits_{length}"] = sum(answer.hit for answer in answers)
                found[f"answer_loss_{length}"] = round(loss, 4)
            nll = sum(mean_nll(model, p, policy, kept) for p in passages)
            found["perplexity"] = round(math.exp(nll / len(passages)), 3)
            return found

        rows.add(known, cells)


def make_haystacks(args, tokenizer, read: list, hidden_by: int) -> dict[int, list]:
    """By length, haystacks of the texts in turn."""
    return {
        length: [
            needles.make(
                tokenizer, read[i % len(read)].content, length, hidden_by, f"test {i}"
            )
            for i in range(args.haystacks or NUM_HAYSTACKS)
        ]
        for length in args.lengths or LENGTHS
    }


def make_passages(tokenizer, read: list) -> list[list[int]]:
    """Of each text the tokens of which some are scored."""
    start = texts.opening(tokenizer)
    return [
        start + texts.passages(tokenizer, text.content, 1, SCORED_TO)[0]
        for text in read
    ]


def described(args, read: list, window: int, full: tuple[int, ...]) -> dict[str, Any]:
    """Columns that every row has."""
    return {
        "model": Path(args.model).name,
        "texts": "; ".join(text.name for text in read),
        "dtype": "float32",
        "num_sink_tokens": NUM_SINK_TOKENS,
        "window_size": WINDOW,
        "own_window": window,
        "full_layers": " ".join(map(str, full)),
    }


def engine_policies(full: tuple[int, ...]) -> list[tuple[str, Policy]]:
    """(what a row is called, policy): stock attention, then every choice of layers."""
    sizes = (NUM_SINK_TOKENS, WINDOW)
    found = [("dense", Policy("dense"))]
    for positions in ("absolute", "cache"):
        for chosen in subsets(full):
            policy = Policy(
                "layers", *sizes, positions, retrieval_layers=chosen or None
            )
            found.append((" ".join(map(str, chosen)), policy))
    return found


def measure_engine(args: argparse.Namespace, path: Path) -> None:
    """As :func:`measure`, in vLLM: needles found by greedy generation, perplexity."""
    from tests.helpers.engine import prompt_logprobs

    model, tokenizer = attention.load(args.model, dtype="float32")
    read = [texts.read(file) for file in args.texts]
    sample = texts.encode(tokenizer, read[0].content[:200])
    full, window = attention.inspect(model, sample).full, own_window(model)
    del model
    haystacks = make_haystacks(args, tokenizer, read, max(WINDOW, window))
    passages = make_passages(tokenizer, read)
    longest = max(*haystacks, *map(len, passages)) + 16
    rows = Rows(path)
    for name, policy in engine_policies(full):
        known = {
            **described(args, read, window, full),
            "retrieval_layers": name,
            "sink_positions": policy.sink_positions or "",
        }

        def cells(policy=policy) -> dict[str, Any]:
            found: dict[str, Any] = {}
            with policy.open_engine(args.model, longest, CHUNK) as llm:
                for length, made in haystacks.items():
                    count = sum(len(haystack.questions) for haystack in made)
                    found[f"num_needles_{length}"] = count
                    found[f"hits_{length}"] = generated_hits(llm, made)
                nll = [
                    -logprobs[SCORED_FROM - 1 :].mean().item()
                    for passage in passages
                    for logprobs in prompt_logprobs(llm, [passage])
                ]
            found["perplexity"] = round(math.exp(sum(nll) / len(nll)), 3)
            return found

        rows.add(known, cells)


@torch.inference_mode()
def mean_nll(model, passage: list[int], policy, kept: torch.Tensor) -> float:
    """Of the tokens from ``SCORED_FROM`` on."""
    tokens = torch.tensor([passage])
    with attention.Headwise(policy=policy, retrieval=kept):
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    total = 0.0
    # A few hundred tokens at a time: the vocabulary may be large.
    for start in range(SCORED_FROM, len(passage), 256):
        stop = min(start + 256, len(passage))
        logits = model.lm_head(hidden[0, start - 1 : stop - 1]).float()
        target = tokens[0, start:stop]
        total += float(
            torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        )
    return total / (len(passage) - SCORED_FROM)
