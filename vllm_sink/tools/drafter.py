"""A speculative drafter's share of the KV cache, from ``--speculative-config``.

Its layers are under the policy, beside the model's (docs/speculation.md); layers with
states keep one more for each token that is drafted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from vllm_sink.policy.draft_heads import KEEPS_EVERYTHING, DraftHeads
from vllm_sink.start.drafters import CACHELESS_DRAFTERS, POLICED_DRAFTERS
from vllm_sink.tools.cache_shape import CacheShape, LayerKind
from vllm_sink.tools.model_layers import read_config, read_shape

SETTING = "--speculative-config"
# What a config.json calls the number of its MTP layers; one where it says nothing.
MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


@dataclass(frozen=True)
class Drafter:
    """What a drafter adds to the cache of one GPU.

    Args:
        method: As vLLM calls it.
        num_tokens: Drafted in a step.
        kinds: Its layers; none where it has no KV cache.
    """

    method: str
    num_tokens: int
    kinds: tuple[LayerKind, ...] = ()

    @property
    def num_layers(self) -> int:
        return sum(kind.num_layers for kind in self.kinds)

    @property
    def words(self) -> str:
        """What it adds, as a clause."""
        return f"{self.method} drafter, {self.num_layers} layers with a cache"

    def with_states(self, shape: CacheShape) -> CacheShape:
        """The shape of a model's cache with the states of drafted tokens."""
        kinds = (
            replace(kind, num_states=kind.num_states + self.num_tokens * is_state)
            for kind in shape.kinds
            for is_state in [kind.state_bytes > 0]
        )
        return replace(shape, kinds=tuple(kinds))

    def with_layers(self, shape: CacheShape) -> CacheShape:
        """The shape of a model's cache with the drafter's layers."""
        kinds = list(shape.kinds)
        for own in self.kinds:
            alike = [replace(kind, num_layers=own.num_layers) == own for kind in kinds]
            if True in alike:
                kind = kinds[i := alike.index(True)]
                kinds[i] = replace(kind, num_layers=kind.num_layers + own.num_layers)
            else:
                kinds.append(own)
        return replace(shape, kinds=tuple(kinds))

    def heads(self, shape: CacheShape, num_ranks: int) -> DraftHeads | None:
        """Its heads, beside heads of two kinds.

        Raises:
            ValueError: The start would refuse it beside these.
        """
        if not self.kinds:
            return None
        kind = next(kind for kind in shape.kinds if kind.is_governed)
        if self.method not in KEEPS_EVERYTHING:
            raise ValueError(
                f"{SETTING}'s method must be one of {', '.join(KEEPS_EVERYTHING)} with "
                f"heads of two kinds, got {self.method!r}; draft with n-grams"
            )
        own = self.kinds[0]
        if len(self.kinds) > 1 or own.head_size != kind.head_size:
            raise ValueError(
                f"{SETTING}'s model must have KV heads of {kind.head_size}, as the "
                f"model has, got {', '.join(str(x.head_size) for x in self.kinds)}; "
                "draft with n-grams"
            )
        count = own.num_kv_heads * num_ranks
        return DraftHeads(own.num_layers, count, KEEPS_EVERYTHING[self.method])


def read_drafter(
    text: str, config: Any, shape: CacheShape, dtype: str, num_ranks: int
) -> Drafter:
    """The drafter of a model.

    Args:
        text: vLLM's ``--speculative-config``.
        config, shape: The served model's.

    Raises:
        ValueError: A setting that names no drafter, or one that the start refuses.
    """
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        given = error
    if not isinstance(given, dict):
        raise ValueError(
            f"{SETTING} must be a JSON object, got {text!r}; write for example "
            '\'{"method": "mtp", "num_speculative_tokens": 2}\''
        )
    method, count = given.get("method"), given.get("num_speculative_tokens")
    known = sorted(POLICED_DRAFTERS | CACHELESS_DRAFTERS)
    if method not in known:
        raise ValueError(
            f"{SETTING}'s method must be one of {', '.join(known)}, got {method!r}; "
            "name it there"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{SETTING}'s num_speculative_tokens must be an integer >= 1, got "
            f"{count!r}; name it there"
        )
    if method in CACHELESS_DRAFTERS:
        return Drafter(method, count)
    if method == "mtp":
        return Drafter(method, count, (_mtp_layers(config, shape),))
    if not isinstance(given.get("model"), str):
        raise ValueError(
            f"{SETTING}'s model must be a folder or a name on the Hub with {method}, "
            f"got {given.get('model')!r}; name it there"
        )
    own = read_shape(read_config(given["model"]), dtype, num_ranks)
    if not all(kind.is_governed for kind in own.kinds):
        raise ValueError(
            f"{SETTING}'s model must have full attention alone, got "
            f"{given['model']!r}; draft with n-grams"
        )
    return Drafter(method, count, own.kinds)


def _mtp_layers(config: Any, shape: CacheShape) -> LayerKind:
    """A model's own MTP layers, which attend as its full ones."""
    configs = (config, config.get_text_config())
    counts = [getattr(x, name, None) for x in configs for name in MTP_LAYERS]
    kind = next(kind for kind in shape.kinds if kind.is_governed)
    return replace(kind, num_layers=max(next(filter(None, counts), 1), 1))
