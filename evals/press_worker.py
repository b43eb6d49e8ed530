"""The process that ``evals.peers`` starts in the environment of kvpress.

It imports nothing of this project: that environment has another transformers and no
vLLM. Its standard input is lines of JSON, the first with the model and the haystacks'
tokens, then one for each press; it answers each of these with a line.

A press reads a haystack, compresses its cache, and only then the questions follow, each
apart from the others at its true positions, teacher-forced: as ``needles.ask`` does it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import torch

MASKED = "masked_key_indices"  # kvpress's, on an attention module


def make_press(name: str, ratio: float) -> Any:
    """kvpress's press of that name with its own defaults; ``ratio`` is dropped.

    AdaKV gets the epsilon of 0.01 that kvpress's own evaluation has for it.
    """
    if name == "none":
        return contextlib.nullcontext
    import kvpress

    if name == "AdaKV+ExpectedAttention":
        inner = kvpress.ExpectedAttentionPress(compression_ratio=ratio, epsilon=0.01)
        return kvpress.AdaKVPress(inner)
    return getattr(kvpress, f"{name}Press")(compression_ratio=ratio)


def ratio_for(kept: int, num_tokens: int) -> float:
    """The compression ratio at which kvpress keeps ``kept`` of ``num_tokens`` tokens.

    It cuts ``num_tokens * (1 - ratio)`` to a whole number: half a token above is safe.
    """
    return max(0.0, 1 - (kept + 0.5) / num_tokens)


def pairs_held(cache, attentions: list) -> int:
    """Key-value pairs of one request that count, over all layers and KV heads.

    What AdaKV and KVzip drop is only masked in kvpress; it counts as dropped.
    """
    held = 0
    for layer, attention in zip(cache.layers, attentions, strict=True):
        held += layer.keys.shape[1] * layer.keys.shape[2]
        masked = getattr(attention, MASKED, None)
        held -= 0 if masked is None else len(masked[2])
    return held


@torch.inference_mode()
def ask(
    model, cache, num_context: int, questions: list[tuple[list[int], int]]
) -> list[tuple[float, bool]]:
    """(loss in nats a token of the answer, every token the argmax) of each question.

    The cache, of one request, is left as it was.

    Args:
        num_context: Tokens before a question, those dropped included.
        questions: Tokens, the answer's last, and how many those are.
    """
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    longest = max(len(tokens) for tokens, _ in questions)
    # Padding on the right: no query that counts can see it.
    rows = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens, _ in questions]
    places = torch.arange(num_context, num_context + longest)[None]
    cache.batch_repeat_interleave(len(rows))
    logits = model(
        input_ids=torch.tensor(rows), past_key_values=cache, position_ids=places
    ).logits
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.keys = layer.keys[:1, :, :length]
        layer.values = layer.values[:1, :, :length]
    answers = []
    for row, (tokens, count) in zip(logits, questions, strict=True):
        told = row[len(tokens) - count - 1 : len(tokens) - 1].float()
        answer = torch.tensor(tokens[-count:])
        loss = torch.nn.functional.cross_entropy(told, answer)
        answers.append((float(loss), bool((told.argmax(-1) == answer).all())))
    return answers


@torch.inference_mode()
def read(model, tokens: list[int], press) -> tuple[Any, float]:
    """(the compressed cache of the haystack, CPU seconds that it took)."""
    from transformers import DynamicCache

    cache = DynamicCache()
    start = time.process_time()
    with press(model):
        model.model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    return cache, time.process_time() - start


def measure(model, haystacks: list[dict], name: str, kept: list[int]) -> dict[str, Any]:
    """One press over the haystacks, ``kept`` tokens of each kept by the mean head."""
    attentions = [layer.self_attn for layer in model.model.layers]
    told: dict[str, list] = {"held": [], "loss": [], "hit": [], "cpu_seconds": []}
    for haystack, count in zip(haystacks, kept, strict=True):
        tokens, questions = haystack["tokens"], haystack["questions"]
        press = make_press(name, ratio_for(count, len(tokens)))
        cache, seconds = read(model, tokens, press)
        told["held"].append(pairs_held(cache, attentions))
        told["cpu_seconds"].append(seconds)
        # What is masked is masked in the first of a batch only.
        masked = any(getattr(a, MASKED, None) is not None for a in attentions)
        for group in [[q] for q in questions] if masked else [questions]:
            for loss, hit in ask(model, cache, len(tokens), group):
                told["loss"].append(loss)
                told["hit"].append(hit)
    return told


def main() -> None:
    from transformers import AutoModelForCausalLM

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    job = json.loads(sys.stdin.readline())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.eval()
    for line in sys.stdin:
        told = measure(model, job["haystacks"], **json.loads(line))
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
