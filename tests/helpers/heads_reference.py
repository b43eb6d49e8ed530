"""The independent reference with a mask for every (layer, KV head).

As :mod:`tests.helpers.dense_reference`: Hugging Face's model, no paging, no table
rows. A retrieval head sees everything at true distances, or the sinks and a window of
its own; the turn is its own policy's.
"""

import contextlib
import random

import torch
from transformers import AttentionInterface

from tests.helpers.dense_reference import QUERY_CHUNK, DenseReference, _turn

_settings: dict = {}


def random_heads(
    num_retrieval: int, seed: int = 0, layers: int = 30, kv_heads: int = 3
) -> list[list[int]]:
    """A map with so many retrieval heads, of SmolLM2's shape if none is said."""
    flags = [1] * num_retrieval + [0] * (layers * kv_heads - num_retrieval)
    random.Random(seed).shuffle(flags)
    return [flags[kv_heads * i : kv_heads * (i + 1)] for i in range(layers)]


def whole_layers(*layers: int) -> list[list[int]]:
    return [[int(layer in layers)] * 3 for layer in range(30)]


def _attention(module, query, key, value, mask, scaling, **kwargs):
    flags = _settings["heads"][module.layer_idx]
    group = query.shape[1] // key.shape[1]
    length = query.shape[2]
    result = torch.empty_like(query)
    k = torch.arange(length)
    for head, is_retrieval in enumerate(flags):
        sinks, window = _settings["retrieval" if is_retrieval else "streaming"]
        rows = slice(head * group, (head + 1) * group)
        keys, values = key[:, head : head + 1], value[:, head : head + 1]
        for start in range(0, length, QUERY_CHUNK):
            p = torch.arange(start, min(start + QUERY_CHUNK, length))
            q = query[:, rows, p]
            scores = q @ keys.transpose(2, 3) * scaling
            if _settings["positions"] == "cache" and sinks:
                distance = p.clamp(max=sinks + window - 1) - p
                turned = _turn(q, distance, _settings["theta"])
                near = turned @ keys[:, :, :sinks].transpose(2, 3) * scaling
                scores[..., :sinks] = near
            kept = (k[None] < sinks) | (p[:, None] - k[None] < window)
            visible = kept & (k[None] <= p[:, None])
            scores = scores.masked_fill(~visible, float("-inf"))
            result[:, rows, p] = torch.softmax(scores, dim=-1) @ values
    return result.transpose(1, 2), None


AttentionInterface.register("dense_heads_reference", _attention)


class HeadsReference:
    """Log-probabilities under a head map, of the model that ``dense`` has loaded.

    Args:
        heads: [layers][KV heads], 1 for a retrieval head.
        sinks, window: S and W of the streaming heads.
        retrieval_window: W of the retrieval heads; None: everything.
    """

    def __init__(
        self,
        dense: DenseReference,
        heads,
        sinks,
        window,
        retrieval_window=None,
        positions="cache",
    ) -> None:
        self.dense = dense
        everything = (0, 1 << 40)
        self.settings = dict(
            heads=heads,
            streaming=(sinks, window),
            retrieval=(sinks, retrieval_window) if retrieval_window else everything,
            positions=positions,
            theta=dense.theta,
        )

    @contextlib.contextmanager
    def _selected(self):
        config = self.dense.model.config
        before = config._attn_implementation
        config._attn_implementation = "dense_heads_reference"
        _settings.update(self.settings)
        try:
            yield self.dense.model
        finally:
            config._attn_implementation = before

    @torch.inference_mode()
    def logits(self, tokens) -> torch.Tensor:
        """[T, V] float32."""
        with self._selected() as model:
            return model(torch.tensor([tokens]), use_cache=False).logits[0]

    def logprobs(self, tokens) -> torch.Tensor:
        """[T-1]: the log-probability of each token after the first."""
        chosen = torch.tensor(tokens[1:])[:, None]
        return torch.log_softmax(self.logits(tokens)[:-1], -1).gather(1, chosen)[:, 0]
