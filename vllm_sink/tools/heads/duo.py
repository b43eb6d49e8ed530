"""DuoAttention's gates: retrieval heads by optimisation (arXiv 2410.10819, 2.2).

Every KV head's output is gate x full attention's + (1 - gate) x streaming's. The gates
start at 0.5 and are trained to keep the last hidden states of needle prompts while
their mean is pushed down; the model stays as it is. Minutes instead of seconds; better
than the recipe of ``scores`` below a quarter of the heads (docs/find_heads.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads import needles
from vllm_sink.tools.heads.attention import Headwise, Layers
from vllm_sink.tools.heads.scores import Scores

STEPS = 20
LEARNING_RATE = 0.05
SPARSITY = 0.5  # weight of the mean gate beside the relative squared error


def find(
    model,
    tokenizer,
    text: str,
    layers: Layers,
    policy: RetentionPolicy,
    length: int,
    *,
    steps: int = STEPS,
    on_progress: Callable[[], None] = lambda: None,
) -> Scores:
    """Gates of all KV heads, [0, 1], trained on needles in ``text``.

    Args:
        policy: Of the streaming heads.
        length: Tokens of a prompt.
    """
    gates = torch.full(
        (layers.num_layers, layers.num_kv_heads), 0.5, device=model.device
    ).requires_grad_()
    free = layers.free.to(model.device)
    optimizer = torch.optim.Adam([gates], lr=LEARNING_RATE)
    for step in range(steps):
        haystack = needles.make(
            tokenizer, text, length, policy.window_size, f"duo {step}"
        )
        tokens, start = _conversation(haystack)
        batch = torch.tensor([tokens], device=model.device)
        with torch.inference_mode():
            target = _last_hidden(model, batch)[:, start:].clone()
        with Headwise(policy=policy, gates=gates):
            hidden = _last_hidden(model, batch)[:, start:].float()
        target = target.float().clone()
        error = (hidden - target).square().sum() / target.square().sum()
        loss = error + SPARSITY * gates[free].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
        on_progress()
    gate = torch.where(layers.free, gates.detach().cpu(), torch.zeros(()))
    # A closed gate still comes before a layer that has no choice.
    score = torch.where(layers.free, gate.clamp(min=1e-6), gate)
    return Scores(score, {"gate": gate}, layers)


def _conversation(haystack: needles.Haystack) -> tuple[list[int], int]:
    """The haystack and its answered questions in a row; where these start."""
    asked = [token for question in haystack.questions for token in question.tokens]
    return haystack.tokens + asked, len(haystack.tokens)


def _last_hidden(model, batch: torch.Tensor) -> torch.Tensor:
    return model.base_model(batch, use_cache=False).last_hidden_state
