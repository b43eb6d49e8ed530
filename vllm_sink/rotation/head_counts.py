"""A check of vLLM's numbers of heads against the rows that reach attention.

vLLM views what a model gives its attention as rows of so many heads. Where the
configuration says another number (``num_key_value_heads`` of GPT-BigCode, which has
one), rows are cut in the middle and nothing else need notice: the answer is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_sink.engine import Engine
from vllm_sink.rotation.probe import count_rows

logger = init_logger("vllm.plugins.sink")


def check_head_counts(engine: Engine, layers: dict[str, Any]) -> None:
    """Run each model on a few tokens, once, and count the rows of each layer.

    A model that can't be run like this is left to :func:`refuse_other_heads` in the
    forward of its first step.

    Raises:
        ValueError: Names the layer and its numbers.
    """
    models: dict[int, tuple[torch.nn.Module, dict[str, Any]]] = {}
    for name, layer in layers.items():
        if not layer.impl.heads_counted and (chain := engine.ancestors(layer)):
            models.setdefault(id(chain[-1]), (chain[-1], {}))[1][name] = layer
        layer.impl.heads_counted = True
    for root, members in models.values():
        # Divided by any number of heads: a view must not fail where one is wrong.
        heads = [(layer.num_heads, layer.num_kv_heads) for layer in members.values()]
        tokens = math.lcm(*(number for pair in heads for number in pair))
        try:
            found = count_rows(root, members, engine.vllm_config, tokens)
        except Exception:
            logger.debug("Heads of %s weren't counted", type(root), exc_info=True)
            continue
        for name, (queries, keys) in found.items():
            refuse_other_heads(name, members[name], tokens, queries, keys)


def refuse_other_heads(
    name: str, layer: Any, tokens: int, queries: int, keys: int | None
) -> None:
    """Refuse queries or keys that are not one row a token.

    Args:
        layer: Has ``num_heads`` and ``num_kv_heads``, a worker's.
        queries, keys: Rows of each; None: the layer reads another's keys.

    Raises:
        ValueError: Names the layer and its numbers.
    """
    if queries == tokens and keys in (None, tokens):
        return
    raise ValueError(
        "num_attention_heads and num_key_value_heads must be the model's with "
        f"--attention-backend sink, got {layer.num_heads} and {layer.num_kv_heads} on "
        f"a worker for {name}, where {tokens} tokens have {queries} rows of queries "
        f"and {keys} of keys; correct them in the model's config.json"
    )
