"""Pattern files: a score for each KV head, and the JSON that belongs to them.

The JSON named after a file belongs to it, ``heads.tsv.meta.json`` beside
``heads.tsv``: the fraction, the model it was found for, the digest of its content
(``vllm-sink heads`` writes it). A file without one may have DuoAttention's
``config.json`` in its folder. A model's own ``config.json`` is neither.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections.abc import Callable
from typing import Any

from vllm_sink.policy.head_map import ModelShape, Scores, check_fraction

META_SUFFIX = ".meta.json"
DIGEST = "pattern_sha256"
# One of these makes a config.json a pattern's; the first two are DuoAttention's.
PATTERN_KEYS = ("sink_size", "recent_size", "retrieval_fraction")
# And one of these makes it a model's.
MODEL_KEYS = ("architectures", "transformers_version", "text_config")
WRITE_ROWS = "write a row of numbers a layer, a column a KV head, into a .tsv file"


def read_scores(source: Any, shape: ModelShape) -> Scores:
    """Scores [layers][KV heads] of ``retrieval_heads``, checked against the model.

    A layer that the policy doesn't govern, or that reads another's keys, has no
    scores: what the source says of the first is ignored, of the second it counts for
    the layer whose keys it reads, whose heads get the maximum.

    Args:
        source: Numbers [layers][KV heads], the path of a file, or paths of several,
            of which each head gets its maximum (KVzip has a file a task). By name:
            ``.tsv``, ``.txt`` or ``.csv``, a row a layer (DuoAttention), ``.npy``,
            one array, ``.pt``, one tensor (KVzip); ``.json``, [layers][KV heads], or
            ``{"layer-head": [a score a trial]}`` of *query* heads (Wu et al.,
            arXiv 2404.15574), of whose means a KV head gets its group's maximum.
            All but ``.pt`` and ``.npy`` may be packed, ``.gz``. Rows are those of
            all layers, or of the layers that the policy governs.

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
    """The ``retrieval_fraction`` in the JSON of the pattern files, if any.

    Raises:
        ValueError: It isn't a number from 0 to 1, or several files differ in it.
    """
    found: dict[str, float | None] = {}
    for path in _paths(source):
        meta, beside = _meta(path)
        found[path] = fraction = meta.get("retrieval_fraction")
        if fraction is not None:
            check_fraction(fraction, f"retrieval_fraction of {beside!r}")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{path!r}: {value}" for path, value in found.items())
        raise ValueError(
            "sink.retrieval_fraction must be given where pattern files recommend "
            f"different ones, got {told}; pass the one that you want"
        )
    return next(iter(found.values()), None)


def check_model(source: Any, shape: ModelShape) -> None:
    """Refuse a pattern file that states another model's facts."""
    for path in _paths(source):
        meta, _ = _meta(path)
        for name, expected in shape.facts:
            found = meta.get(name)
            if found is not None and found != expected:
                raise ValueError(
                    f"sink.retrieval_heads must be a pattern of {shape.name} ({name}="
                    f"{expected!r}), got {path!r}, found for a model with {name}="
                    f"{found!r}; run `vllm-sink heads` on the model that you serve"
                )


def digest(content: str) -> str:
    """The digest of a file of numbers, whatever the white space between them."""
    return hashlib.sha256(" ".join(content.split()).encode()).hexdigest()[:16]


def _paths(source: Any) -> list[str]:
    entries = [source] if isinstance(source, str) else source
    if not isinstance(entries, (list, tuple)):
        return []
    return [entry for entry in entries if isinstance(entry, str)]


def _meta(path: str) -> tuple[dict, str]:
    """The facts in the JSON of a pattern file, and the JSON's path."""
    own = path + META_SUFFIX
    if os.path.isfile(own):
        meta = _read_object(own, f"mend it, or delete it to use {path!r} alone")
        known = meta.get(DIGEST)
        if known is not None and os.path.isfile(path) and known != _digest_of(path):
            raise ValueError(
                f"{own!r} must describe the content of {path!r}, got that of another "
                "one; delete it, and pass sink.retrieval_fraction if the file was "
                "changed by hand"
            )
        return meta, own
    beside = os.path.join(os.path.dirname(path), "config.json")
    if not os.path.isfile(beside) or os.path.abspath(path) == os.path.abspath(beside):
        return {}, beside
    config = _read_object(beside, "mend it or move the pattern elsewhere")
    is_patterns = any(key in config for key in PATTERN_KEYS)
    if not is_patterns or any(key in config for key in MODEL_KEYS):
        return {}, beside
    return config, beside


def _digest_of(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return digest(file.read())
    except (OSError, ValueError):  # told where the file is read
        return None


def _read_object(path: str, remedy: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} must be JSON, got {error}; {remedy}") from None
    return config if isinstance(config, dict) else {}


def _read_file(path: str, shape: ModelShape) -> Scores:
    stem, kind = os.path.splitext(path)
    kind = kind.lower()
    opened: Callable[..., Any] = open
    if kind == ".gz":
        opened, kind = gzip.open, os.path.splitext(stem)[1].lower()
        if kind not in TEXTS:
            raise ValueError(
                f"sink.retrieval_heads must be one of {', '.join(sorted(TEXTS))} "
                f"inside a .gz, got {path!r}; unpack it with gunzip"
            )
    if kind not in (*TEXTS, *ARRAYS):
        raise ValueError(
            f"sink.retrieval_heads must end in {', '.join(sorted((*TEXTS, *ARRAYS)))} "
            f"or .gz, got {path!r}; {WRITE_ROWS}"
        )
    if not os.path.isfile(path):
        raise ValueError(
            f"sink.retrieval_heads must be a readable file, got {path!r}, which is "
            "not one; give the path on the machine that configures the engine"
        )
    try:
        if kind in TEXTS:
            with opened(path, "rt", encoding="utf-8-sig") as file:
                values = TEXTS[kind](file.read())
        else:
            values = ARRAYS[kind](path)
    except Exception as error:  # torch.load raises many kinds on a foreign file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"sink.retrieval_heads must be a pattern file, got {path!r}, which could "
            f"not be read as {kind}: {reason}; {WRITE_ROWS}, or let `vllm-sink heads` "
            "write one"
        ) from error
    if isinstance(values, dict):
        values = _fold_query_heads(values, shape, path)
    return _checked(values, shape, repr(path))


def _parse_rows(content: str) -> list[list[float]]:
    """Rows of numbers between tabs, spaces or commas; ``#`` starts a comment."""
    lines = (line.replace(",", " ").split() for line in content.splitlines())
    return [[float(x) for x in line] for line in lines if line and line[0][0] != "#"]


def _read_tensor(path: str) -> Any:
    import torch

    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"a tensor was expected, got a {type(tensor).__name__}")
    return tensor.float().tolist()


def _read_array(path: str) -> Any:
    import numpy

    return numpy.load(path, allow_pickle=False).astype(float).tolist()


# Readers by ending: of a file's text, and of its path.
TEXTS: dict[str, Callable[[str], Any]] = {
    ".tsv": _parse_rows,
    ".txt": _parse_rows,
    ".csv": _parse_rows,
    ".json": json.loads,
}
ARRAYS: dict[str, Callable[[str], Any]] = {".npy": _read_array, ".pt": _read_tensor}


def _fold_query_heads(values: dict, shape: ModelShape, path: str) -> Scores:
    """[layers][KV heads] of ``{"layer-head": trials}``: mean, then the maximum."""
    wanted = {
        f"{layer}-{head}": (layer, head)
        for layer in range(shape.num_layers)
        for head in range(shape.num_heads)
    }
    read = {key for key, (layer, _) in wanted.items() if layer in shape.readers}
    if not read <= values.keys() <= wanted.keys():
        odd = sorted((values.keys() - wanted.keys()) | (read - values.keys()))[0]
        state = "more than those" if odd in values else "not"
        raise ValueError(
            f"sink.retrieval_heads must name the {shape.num_layers} layers x "
            f"{shape.num_heads} query heads of {shape.name}, got {path!r}, which has "
            f"{len(values)} and {state} {odd!r}; use a file of this model"
        )
    group = shape.num_heads // shape.num_kv_heads
    scores: Scores = [
        [-math.inf] * shape.num_kv_heads if layer in shape.readers else []
        for layer in range(shape.num_layers)
    ]
    for key, (layer, head) in wanted.items():
        if key not in read:
            continue
        trials = values[key] if isinstance(values[key], list) else [values[key]]
        if not all(_is_finite(trial) for trial in trials) or not trials:
            raise _not_a_number(repr(path), layer, head, values[key])
        mean = sum(trial / len(trials) for trial in trials)
        scores[layer][head // group] = max(scores[layer][head // group], mean)
    return scores


def _checked(values: Any, shape: ModelShape, name: str) -> Scores:
    """``values`` as finite floats [layers][KV heads], of the governed layers."""
    is_table = isinstance(values, (list, tuple)) and all(
        isinstance(layer, (list, tuple)) for layer in values
    )
    rows = _rows_by_layer(values, shape) if is_table else None
    if rows is None:
        found = "no table"
        if is_table:
            sizes = {len(layer) for layer in values}
            heads = " or ".join(map(str, sorted(sizes))) or "no"
            found = f"{len(values)} layers x {heads} heads"
        layers = f"{shape.num_layers} layers"
        if len(shape.governed) < shape.num_layers:
            layers += f" (or the {len(shape.governed)} with full attention)"
        raise ValueError(
            f"sink.retrieval_heads must have {layers} x {shape.num_kv_heads} KV heads "
            f"for {shape.name}, got {found} in {name}; use a pattern of this model"
        )
    for i, row in rows.items():
        for head, score in enumerate(row):
            if not _is_finite(score):
                raise _not_a_number(name, i, head, score)
    scores: Scores = [[] for _ in range(shape.num_layers)]
    for i, row in rows.items():
        owner = shape.owner(i)
        assert owner is not None, "only readers have rows"
        known = scores[owner] or row
        scores[owner] = [float(max(pair)) for pair in zip(known, row, strict=True)]
    return scores


def _rows_by_layer(values: Any, shape: ModelShape) -> dict[int, Any] | None:
    """The rows that count, by layer; None where they don't fit the model."""
    kinds = (range(shape.num_layers), shape.readers, shape.governed)
    layers = next((kind for kind in kinds if len(kind) == len(values)), None)
    if layers is None:
        return None
    rows = {
        layer: row
        for layer, row in zip(layers, values, strict=True)
        # A map that was resolved before has no row for a reader.
        if layer in shape.readers and (row or layer in shape.governed)
    }
    fits = all(len(row) == shape.num_kv_heads for row in rows.values())
    return rows if fits else None


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
