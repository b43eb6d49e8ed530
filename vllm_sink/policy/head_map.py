"""Which KV heads are retrieval heads: files, scores and the choice among them.

A *retrieval head* keeps everything (or a window of its own), a *streaming head*
the sinks and the window (DuoAttention, arXiv 2410.10819). All query heads of a
KV head share its policy::

    scores [layers][KV heads]   --fraction, layers-->   HeadMap (true: retrieval)

Read in the process that configures the engine, once; workers get values.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Scores = list[list[float]]
# A score from which a head is a retrieval head where no fraction is given.
THRESHOLD = 0.5
# Facts of a model that the config.json beside a pattern may state.
FACTS = ("model_type", "hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class HeadMap:
    """The KV heads of a whole model, not of a tensor-parallel rank.

    Args:
        is_retrieval: [layers][KV heads], true for a retrieval head.
    """

    is_retrieval: tuple[tuple[bool, ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.is_retrieval)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of one layer."""
        return len(self.is_retrieval[0])

    @property
    def num_retrieval_heads(self) -> int:
        return sum(map(sum, self.is_retrieval))

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads

    @property
    def splits_layers(self) -> bool:
        """Whether some layer has heads of both kinds."""
        return any(len(set(layer)) > 1 for layer in self.is_retrieval)

    @property
    def is_uniform(self) -> bool:
        """Whether all heads are of one kind."""
        return self.num_retrieval_heads in (0, self.num_heads)

    def count(self, heads: Iterable[int]) -> int:
        """Retrieval heads among these KV heads, over all layers."""
        heads = list(heads)
        return sum(layer[head] for layer in self.is_retrieval for head in heads)

    def values(self) -> list[list[int]]:
        """As ``retrieval_heads`` takes it: 1 a retrieval head, 0 a streaming one."""
        return [[int(head) for head in layer] for layer in self.is_retrieval]


@dataclass(frozen=True)
class ModelShape:
    """The model that a map must fit.

    Args:
        num_layers: Attention layers. num_kv_heads: KV heads of a layer.
        num_heads: Query heads of a layer.
        facts: What is known of :data:`FACTS`.
        name: For messages.
    """

    num_layers: int
    num_kv_heads: int
    num_heads: int
    facts: tuple[tuple[str, Any], ...] = ()
    name: str = "the model"


def heads_of_rank(rank: int, num_ranks: int, num_kv_heads: int) -> range:
    """The KV heads that a tensor-parallel rank holds; fewer than ranks: shared."""
    if num_kv_heads >= num_ranks:
        share = num_kv_heads // num_ranks
        return range(rank * share, (rank + 1) * share)
    head = rank // (num_ranks // num_kv_heads)
    return range(head, head + 1)


def select(
    scores: Sequence[Sequence[float]],
    fraction: float | None = None,
    layers: Iterable[int] = (),
) -> HeadMap:
    """The retrieval heads: the best of all by score, and whole layers.

    Args:
        scores: [layers][KV heads].
        fraction: 0 to 1 of all heads, to the nearest whole head, halves up; ties
            go to the lower layer, then the lower head. None: scores of at least
            :data:`THRESHOLD`.
        layers: Indices of layers all of whose heads are retrieval heads.
    """
    if fraction is None:
        chosen = {
            (i, head)
            for i, layer in enumerate(scores)
            for head, score in enumerate(layer)
            if score >= THRESHOLD
        }
    else:
        order = sorted(
            (-score, i, head)
            for i, layer in enumerate(scores)
            for head, score in enumerate(layer)
        )
        count = math.floor(fraction * len(order) + 0.5)
        chosen = {(i, head) for _, i, head in order[:count]}
    whole = set(layers)
    return HeadMap(
        tuple(
            tuple(i in whole or (i, head) in chosen for head in range(len(layer)))
            for i, layer in enumerate(scores)
        )
    )


def read_scores(source: Any, shape: ModelShape) -> Scores:
    """Scores [layers][KV heads] of ``retrieval_heads``, checked against the model.

    Args:
        source: Numbers [layers][KV heads], the path of a file, or paths of several,
            of which each head gets its maximum (KVzip has a file a task). By name:
            ``.tsv`` or ``.txt``, a row a layer (DuoAttention; clipped to [0, 1]);
            ``.pt``, one tensor (KVzip); ``.json``, [layers][KV heads], or
            ``{"layer-head": [a score a trial]}`` of *query* heads (Wu et al.,
            arXiv 2404.15574), of whose means a KV head gets its group's maximum.

    Raises:
        ValueError: Names the file or the entry, what is wrong and the remedy.
    """
    if isinstance(source, str):
        return _read_file(source, shape)
    if isinstance(source, (list, tuple)) and source:
        if all(isinstance(entry, str) for entry in source):
            files = [_read_file(path, shape) for path in source]
            return [
                [max(values) for values in zip(*rows, strict=True)]
                for rows in zip(*files, strict=True)
            ]
        return _checked(source, shape, "retrieval_heads")
    raise ValueError(
        "sink.retrieval_heads must be [layers][KV heads] of numbers or the path of a "
        f"pattern file, got {source!r}; `vllm-sink heads` writes one"
    )


def recommended_fraction(source: Any) -> float | None:
    """``retrieval_fraction`` of the ``config.json`` beside a pattern file, if any.

    Raises:
        ValueError: It isn't a number from 0 to 1.
    """
    folder_config = _config_beside(source)
    if folder_config is None or "retrieval_fraction" not in folder_config:
        return None
    fraction = folder_config["retrieval_fraction"]
    if fraction is not None:
        check_fraction(
            fraction, f"retrieval_fraction of the config.json beside {source!r}"
        )
    return fraction


def check_fraction(value: Any, name: str) -> None:
    """Refuse what isn't a number from 0 to 1."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ValueError(
            f"{name} must be a number from 0 to 1, got {value!r}; 0.25 makes a "
            "quarter of the KV heads retrieval heads"
        )


def check_model(source: Any, shape: ModelShape) -> None:
    """Refuse a pattern whose ``config.json`` states another model's facts."""
    folder_config = _config_beside(source)
    for name, expected in shape.facts:
        found = (folder_config or {}).get(name, expected)
        if found != expected:
            raise ValueError(
                f"sink.retrieval_heads must be a pattern of {shape.name} ({name}="
                f"{expected!r}), got {source!r}, found for a model with {name}="
                f"{found!r}; run `vllm-sink heads` on the model that you serve"
            )


def _config_beside(source: Any) -> dict | None:
    if not isinstance(source, str):
        return None
    path = os.path.join(os.path.dirname(source), "config.json")
    if not os.path.isfile(path) or os.path.abspath(source) == os.path.abspath(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path!r} must be JSON, got {error}; mend it or move the pattern elsewhere"
        ) from None
    return config if isinstance(config, dict) else None


def _read_file(path: str, shape: ModelShape) -> Scores:
    kind = os.path.splitext(path)[1].lower()
    readers = {".tsv": _read_rows, ".txt": _read_rows, ".pt": _read_tensor}
    readers[".json"] = _read_json
    if kind not in readers:
        raise ValueError(
            f"sink.retrieval_heads must end in {', '.join(sorted(readers))}, got "
            f"{path!r}; rename the file to what it holds"
        )
    if not os.path.isfile(path):
        raise ValueError(
            f"sink.retrieval_heads must be a readable file, got {path!r}, which is "
            "not one; give the path on the machine that configures the engine"
        )
    try:
        values = readers[kind](path)
    except Exception as error:  # torch.load raises many kinds on a foreign file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"sink.retrieval_heads must be a pattern file, got {path!r}, which could "
            f"not be read as {kind}: {reason}; `vllm-sink heads` writes one"
        ) from error
    if isinstance(values, dict):
        values = _fold_query_heads(values, shape, path)
    scores = _checked(values, shape, repr(path))
    if readers[kind] is _read_rows:
        scores = [[min(max(x, 0.0), 1.0) for x in layer] for layer in scores]
    return scores


def _read_rows(path: str) -> list[list[float]]:
    with open(path, encoding="utf-8") as file:
        return [[float(x) for x in line.split()] for line in file if line.strip()]


def _read_tensor(path: str) -> Any:
    import torch

    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"a tensor was expected, got a {type(tensor).__name__}")
    return tensor.float().tolist()


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _fold_query_heads(values: dict, shape: ModelShape, path: str) -> Scores:
    """[layers][KV heads] of ``{"layer-head": trials}``: mean, then the maximum."""
    wanted = {
        f"{layer}-{head}": (layer, head)
        for layer in range(shape.num_layers)
        for head in range(shape.num_heads)
    }
    if values.keys() != wanted.keys():
        odd = sorted(values.keys() ^ wanted.keys())[0]
        state = "more than those" if odd in values else "not"
        raise ValueError(
            f"sink.retrieval_heads must name the {shape.num_layers} layers x "
            f"{shape.num_heads} query heads of {shape.name}, got {path!r}, which has "
            f"{len(values)} and {state} {odd!r}; use a file of this model"
        )
    group = shape.num_heads // shape.num_kv_heads
    scores = [[-math.inf] * shape.num_kv_heads for _ in range(shape.num_layers)]
    for key, (layer, head) in wanted.items():
        trials = values[key] if isinstance(values[key], list) else [values[key]]
        if not all(_is_finite(trial) for trial in trials) or not trials:
            raise _not_a_number(repr(path), layer, head, values[key])
        mean = sum(trial / len(trials) for trial in trials)
        scores[layer][head // group] = max(scores[layer][head // group], mean)
    return scores


def _checked(values: Any, shape: ModelShape, name: str) -> Scores:
    """``values`` as [layers][KV heads] finite floats."""
    is_table = isinstance(values, (list, tuple)) and all(
        isinstance(layer, (list, tuple)) for layer in values
    )
    sizes = {len(layer) for layer in values} if is_table else set()
    if not is_table or len(values) != shape.num_layers or sizes != {shape.num_kv_heads}:
        found = "no table"
        if is_table:
            heads = " or ".join(map(str, sorted(sizes))) or "no"
            found = f"{len(values)} layers x {heads} heads"
        raise ValueError(
            f"sink.retrieval_heads must have {shape.num_layers} layers x "
            f"{shape.num_kv_heads} KV heads for {shape.name}, got {found} in {name}; "
            "use a pattern of this model"
        )
    for i, layer in enumerate(values):
        for head, score in enumerate(layer):
            if not _is_finite(score):
                raise _not_a_number(name, i, head, score)
    return [[float(score) for score in layer] for layer in values]


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _not_a_number(name: str, layer: int, head: int, value: Any) -> ValueError:
    return ValueError(
        f"sink.retrieval_heads must be finite numbers, got {value!r} at layer {layer}, "
        f"head {head} of {name}; find the heads again"
    )
