"""The rows of vLLM's rotary table, and config changes that only add rows.

YaRN's table has ``original_max_position_embeddings * factor`` rows. Its frequencies
depend on ``factor`` and on ``original_max_position_embeddings / beta``: all three of
``original_max_position_embeddings``, ``beta_fast`` and ``beta_slow`` times the same
number is the same rotation, with more rows.

LongRoPE's magnitude grows with ``max_position_embeddings``, and its long factors hold
where ``max_model_len`` exceeds ``original_max_position_embeddings``: the magnitude is
written down, and a model that was trained on the short factors keeps them.

Dynamic NTK's base depends on ``max_position_embeddings / max_trained_positions``;
where the latter is not given vLLM's table is of a plain rotation.
"""

from __future__ import annotations

import math
import sys
from typing import Any

# Rows: max_position_embeddings. vLLM's limit of max_model_len counts the factor of the
# last two, where there is one.
_PLAIN = frozenset({"default", "llama3", "proportional", "ntk", "dynamic"})
# Kinds whose factor does not count in that limit.
_UNCOUNTED = frozenset({"default", "llama3", "yarn", "longrope"})


def own_max_model_len(text_config: Any) -> int:
    """Positions that vLLM serves without an override: its limit, or the table's."""
    length = getattr(text_config, "max_position_embeddings", None)
    if length is None:
        return sys.maxsize  # nothing is rotated, or vLLM knows of no limit
    limit, rows = length, length
    if tables := rope_tables(text_config):
        rows = min(num_rows(length, table) for table in tables.values())
        limit = max(
            length * counted_factor(text_config, table) for table in tables.values()
        )
    limit = max(limit, getattr(text_config, "model_max_length", None) or 0)
    return int(min(limit, rows))


def num_rows(length: int, table: dict[str, Any]) -> int:
    """Rows of the table that vLLM makes for ``max_position_embeddings`` = length."""
    kind = table.get("rope_type", "default")
    if kind == "yarn":
        return int(table["original_max_position_embeddings"] * table["factor"])
    return int(length * table["factor"]) if kind == "linear" else length


def rope_tables(text_config: Any) -> dict[str, dict[str, Any]]:
    """A config's ``rope_parameters`` by kind of layer; "" where all are alike."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        return {key: dict(table or {}) for key, table in parameters.items()}
    return {"": dict(parameters)}


def longer_table(text_config: Any, max_model_len: int) -> dict[str, Any] | None:
    """Config changes for a longer table of the same rotation; None without any."""
    before = rope_tables(text_config)
    tables, lengths = {}, []
    for key, table in before.items():
        kind = table.get("rope_type", "default")
        lengths.append(max_model_len)
        if kind == "yarn":
            table = _longer_yarn(table, max_model_len)
        elif kind == "longrope":
            table = _longer_longrope(text_config, table, max_model_len)
        elif kind == "dynamic" and "max_trained_positions" in table:
            table = _longer_dynamic(text_config, table, max_model_len)
        elif kind == "linear":
            lengths[-1] = math.ceil(max_model_len / counted_factor(text_config, table))
        elif kind not in _PLAIN:
            return None
        tables[key] = table
    changes: dict[str, Any] = {"max_position_embeddings": max(lengths)}
    if 0 < (getattr(text_config, "model_max_length", None) or 0) < max_model_len:
        changes["model_max_length"] = max_model_len
    # Of its own place in a config, which goes before the table's.
    name = "original_max_position_embeddings"
    own = getattr(text_config, name, None)
    needed = max(table.get(name) or 0 for table in tables.values())
    if own and own < needed:
        changes[name] = needed
    # Else Transformers would take the original length from the changed one.
    if any(name in table for table in tables.values()) or tables != before:
        changes["rope_parameters"] = tables.get("", tables)
    return changes


def counted_factor(text_config: Any, table: dict[str, Any]) -> float:
    """The factor that vLLM's limit of ``max_model_len`` counts."""
    if "gemma3" in text_config.model_type:
        return 1.0
    if table.get("rope_type", "default") in _UNCOUNTED:
        return 1.0
    return table.get("factor") or 1.0


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


def _longer_longrope(
    text_config: Any, table: dict[str, Any], max_model_len: int
) -> dict[str, Any]:
    length = text_config.max_position_embeddings
    original = table["original_max_position_embeddings"]
    if max_model_len <= length:
        return table
    scale = length / original
    magnitude = 1.0
    if scale > 1:
        magnitude = math.sqrt(1 + math.log(scale) / math.log(original))
    changes: dict[str, Any] = {
        name: table.get(name) or magnitude for name in ("short_mscale", "long_mscale")
    }
    if not table.get("factor") and not table.get("attention_factor"):
        changes["attention_factor"] = magnitude  # the Transformers backend's name
    if scale <= 1:  # trained on the short factors
        changes["original_max_position_embeddings"] = max_model_len
    return table | changes


def _longer_dynamic(
    text_config: Any, table: dict[str, Any], max_model_len: int
) -> dict[str, Any]:
    longer = max(max_model_len / text_config.max_position_embeddings, 1)
    return table | {"max_trained_positions": table["max_trained_positions"] * longer}
