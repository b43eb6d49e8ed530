"""Scores of heads that were tried beside the ones of ``vllm-sink heads``.

Each is cheap, and none is as good: ``evals.methods`` has the table.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from vllm_sink.policy.head_map import num_chosen
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import answers, fraction, needles, scores, texts
from vllm_sink.tools.heads.attention import Headwise, Layers

FIRST_KEYS = 4  # of a passage: sinks, which every head keeps
GREEDY_FROM, GREEDY_TO = 0.25, 0.1
GREEDY_HAYSTACKS = 2


@torch.inference_mode()
def repeat(model, tokenizer, text: str, layers: Layers) -> scores.Scores:
    """KVzip's (arXiv 2505.23416), a head's: what its keys are worth to a repetition.

    A passage is read twice over, as the recipe's. A key is worth the largest attention
    that the second copy pays it; a head the mean of its keys of the first copy.
    """
    size, opening = scores.PASSAGE_LENGTH, texts.opening(tokenizer)
    start = len(opening) + FIRST_KEYS
    stop = len(opening) + size
    total = torch.zeros(layers.num_layers, layers.num_kv_heads)
    for passage in texts.passages(tokenizer, text, scores.NUM_PASSAGES, size):
        worth: dict[int, torch.Tensor] = {}

        def watch(layer: int, weights: torch.Tensor, _first: int, worth=worth) -> None:
            most = weights[0, :, :, :, start:stop].amax(dim=(1, 2)).cpu()
            worth[layer] = torch.maximum(worth.get(layer, most), most)

        tokens = torch.tensor([opening + passage + passage], device=model.device)
        with Headwise(watch=watch, watch_from=stop):
            model.base_model(tokens, use_cache=False)
        for reader, owner in layers.readers:
            worth[owner] = torch.maximum(worth[owner], worth.pop(reader))
        for layer, keys in worth.items():
            total[layer] += keys.mean(1) / scores.NUM_PASSAGES
    return _scores(total, layers)


def weighted(
    model, tokenizer, text: str, layers: Layers, policy: RetentionPolicy, length: int
) -> scores.Scores:
    """The recipe's attention x what opening the head's gate takes from the loss.

    The larger of echo and induction, times the negative gradient of the loss of the
    answers by the gate, all gates at a half.
    """
    measured = scores.find(model, tokenizer, text, layers).measured
    gates = torch.full((layers.num_layers, layers.num_kv_heads), 0.5).requires_grad_()
    for index in range(answers.NUM_HAYSTACKS):
        reading = _reading(model, tokenizer, text, policy, length, index)
        with Headwise(policy=policy, gates=gates):
            loss = cross_entropy(reading.logits(model), reading.answers)
        loss.backward()
    assert gates.grad is not None, "the loss depends on the gates"
    attention = torch.maximum(measured["echo"], measured["induction"])
    return _scores(attention * (-gates.grad).clamp(min=0), layers)


@torch.no_grad()
def greedy(
    model, tokenizer, text: str, layers: Layers, policy: RetentionPolicy, length: int
) -> scores.Scores:
    """The recipe's quarter, thinned out by the loss of answers, a head at a time.

    The head without which the loss is the smallest goes, until a tenth is left.
    """
    found = scores.find(model, tokenizer, text, layers)
    readings = [
        _reading(model, tokenizer, text, policy, length, index)
        for index in range(GREEDY_HAYSTACKS)
    ]

    def loss(kept: torch.Tensor) -> float:
        with Headwise(policy=policy, retrieval=kept):
            losses = [cross_entropy(r.logits(model), r.answers) for r in readings]
        return float(sum(losses))

    kept = fraction.best_heads(found, GREEDY_FROM)
    value = found.value.clone()
    value[kept] += 1
    last = num_chosen(GREEDY_TO, layers.num_heads)
    for count in range(int(kept.sum()), last, -1):
        losses = {}
        for layer, head in kept.nonzero().tolist():
            kept[layer, head] = False
            losses[layer, head] = loss(kept)
            kept[layer, head] = True
        layer, head = min(losses, key=lambda place: losses[place])
        kept[layer, head] = False
        # Those that go first come last among the quarter.
        value[layer, head] = 2 - count / layers.num_heads
    value[kept] += 2
    return _scores(value, layers)


def _reading(model, tokenizer, text, policy, length, index: int) -> answers.Reading:
    seed = f"answers {index}"
    size = answers.LONGER * length
    made = needles.make(tokenizer, text, size, policy.window_size, seed)
    return answers.read(model, made)


def _scores(value: torch.Tensor, layers: Layers) -> scores.Scores:
    return scores.Scores(torch.where(layers.free, value, torch.zeros(())), {}, layers)
