"""How to have vLLM build a rotary table with a row for every position.

vLLM sizes the table by the model's config, so a longer one takes an override of it
(``--hf-overrides``). Which one depends on the kind of rotation; those here leave the
rotation of every position exactly as it was and only add rows.

YaRN's table has ``original_max_position_embeddings * factor`` rows. Its frequencies
depend on ``factor`` and on ``original_max_position_embeddings / beta``: all three of
``original_max_position_embeddings``, ``beta_fast`` and ``beta_slow`` times the same
number is the same rotation, with more rows.
"""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

# Rows: max_position_embeddings, and that times the factor.
_PLAIN = frozenset({"default", "llama3", "proportional"})
_SCALED = frozenset({"linear", "ntk"})


def max_model_len_remedy(model_config: Any, max_model_len: int, rows: int) -> str:
    """What to add to a command that asks for more positions than a table has rows.

    Args:
        model_config: vLLM's, of the model whose table it is; None for a drafter,
            which takes no overrides from the command line.
        max_model_len: What was asked for.
        rows: The rows of the table.
    """
    if model_config is not None and isinstance(model_config.hf_overrides, dict):
        text = model_config.hf_text_config
        overrides = longer_table(text, max_model_len)
        placed = overrides and _at(model_config.hf_config, text, overrides)
        if placed:
            merged = json.dumps(_merge(model_config.hf_overrides, placed))
            return (
                f"pass --hf-overrides {shlex.quote(merged)} so that vLLM builds a "
                "longer table"
            )
    return f"pass --max-model-len {rows}"


def longer_table(text_config: Any, max_model_len: int) -> dict[str, Any] | None:
    """Changes to a text config; None where none leaves the rotation as it is."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_type = any(isinstance(value, dict) for value in parameters.values())
    tables = dict(parameters) if by_type else {"": parameters}
    lengths, has_original = [], False
    for key, table in tables.items():
        table = table or {}
        kind = table.get("rope_type", "default")
        if kind == "yarn":
            tables[key] = _longer_yarn(table, max_model_len)
        elif kind not in _PLAIN | _SCALED:
            return None
        has_original |= "original_max_position_embeddings" in table
        # vLLM's own limit counts the factor, but for Gemma 3.
        counts = kind in _SCALED and "gemma3" not in text_config.model_type
        lengths.append(
            math.ceil(max_model_len / table["factor"]) if counts else max_model_len
        )
    changes: dict[str, Any] = {"max_position_embeddings": max(lengths)}
    if (
        getattr(text_config, "model_max_length", None) or max_model_len
    ) < max_model_len:
        changes["model_max_length"] = max_model_len
    if has_original:  # else Transformers would take it from the changed length
        changes["rope_parameters"] = tables if by_type else tables[""]
    return changes


def lengthen(text_config: Any, max_model_len: int) -> None:
    """Make a drafter's table as long as the served model's requests.

    vLLM hands the target's overrides to no drafter, and itself lengthens EAGLE's.
    """
    current = getattr(text_config, "max_position_embeddings", None)
    changes = longer_table(text_config, max_model_len)
    if not changes or current is None:
        return
    changes["max_position_embeddings"] = max(
        current, changes["max_position_embeddings"]
    )
    for name, value in changes.items():
        setattr(text_config, name, value)


def _longer_yarn(table: dict[str, Any], max_model_len: int) -> dict[str, Any]:
    original = table["original_max_position_embeddings"]
    needed = math.ceil(max_model_len / table["factor"])
    if needed <= original:
        return table
    return table | {
        "original_max_position_embeddings": needed,
        "beta_fast": (table.get("beta_fast") or 32) * needed / original,
        "beta_slow": (table.get("beta_slow") or 1) * needed / original,
    }


def _at(config: Any, text_config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """``overrides`` under the names that lead from ``config`` to ``text_config``."""
    if config is text_config:
        return overrides
    for name, value in vars(config).items():
        if value is text_config:
            return {name: overrides}
        if hasattr(value, "to_dict") and (inner := _at(value, text_config, overrides)):
            return {name: inner}
    return {}


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[name] = _merge(before, value) if both else value  # type: ignore[arg-type]
    return merged
