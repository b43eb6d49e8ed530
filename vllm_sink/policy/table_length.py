"""How to have vLLM build a rotary table with a row for every position.

    python -m vllm_sink.policy.table_length MODEL 1000000

prints the flag that a model needs. vLLM sizes the table by the model's config, so a
longer one takes an override of it (``--hf-overrides``). Which one depends on the kind
of rotation; those here leave the rotation of every position exactly as it was and only
add rows.

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

import contextlib
import functools
import json
import math
import shlex
import sys
from typing import Any

# Rows: max_position_embeddings. vLLM's limit of max_model_len counts the factor of the
# last two, where there is one.
_PLAIN = frozenset({"default", "llama3", "proportional", "ntk", "dynamic"})
# Kinds whose factor does not count in that limit.
_UNCOUNTED = frozenset({"default", "llama3", "yarn", "longrope"})
# What a rotary table is made of, wherever it is in a config.
ROTATION_KEYS = frozenset(
    {
        "max_position_embeddings",
        "original_max_position_embeddings",
        "model_max_length",
        "partial_rotary_factor",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
)


def max_model_len_remedy(model_config: Any, max_model_len: int, rows: int) -> str:
    """What to add to a command that asks for more positions than a table has rows.

    Args:
        model_config: vLLM's, of the model whose table it is; None for a drafter,
            which takes no overrides from the command line.
        max_model_len: What was asked for.
        rows: The rows of the table.
    """
    if model_config is not None and isinstance(model_config.hf_overrides, dict):
        hf_config, text_config = own_configs(model_config)
        kept = without_rotation(model_config.hf_overrides)
        overrides = longer_overrides(hf_config, text_config, max_model_len, kept)
        if overrides:
            return f"pass {flag(overrides)} so that vLLM builds a longer table"
    return f"pass --max-model-len {rows}"


def flag(overrides: dict[str, Any]) -> str:
    """``--hf-overrides`` as it is typed."""
    return f"--hf-overrides {shlex.quote(json.dumps(overrides))}"


def overrides_for(model: str, max_model_len: int) -> dict[str, Any]:
    """``hf_overrides`` with which vLLM serves ``max_model_len`` positions of a model.

    Empty where the model's own table is long enough.

    Args:
        model: A folder or a name.

    Raises:
        ValueError: No override makes the table longer and leaves the rotation alone.
    """
    hf_config, text_config = _load(model, False, None, None, "auto")
    overrides = longer_overrides(hf_config, text_config, max_model_len)
    if overrides is None:
        most = own_max_model_len(text_config)
        raise ValueError(
            f"max_model_len must be at most {most} for {model}, got {max_model_len}; "
            f"no longer rotary table rotates as its own does: pass {most} or less"
        )
    return overrides


def longer_overrides(
    hf_config: Any,
    text_config: Any,
    max_model_len: int,
    others: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """``others`` and what makes the table long enough; None where nothing does.

    Args:
        hf_config, text_config: As the model's files have them.
        others: Overrides of what the table is not made of.
    """
    if max_model_len <= own_max_model_len(text_config):
        return others or {}
    changes = longer_table(text_config, max_model_len)
    placed = changes and _at(hf_config, text_config, changes)
    return _merge(others or {}, placed) if placed else None


def own_max_model_len(text_config: Any) -> int:
    """Positions that vLLM serves without an override: its limit, or the table's."""
    length = getattr(text_config, "max_position_embeddings", None)
    if length is None:
        return sys.maxsize  # nothing is rotated, or vLLM knows of no limit
    limit, rows = length, length
    if tables := rope_tables(text_config):
        rows = min(num_rows(length, table) for table in tables.values())
        limit = max(length * _counted(text_config, table) for table in tables.values())
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
    """Changes to a text config; None where none leaves the rotation as it is."""
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
            lengths[-1] = math.ceil(max_model_len / _counted(text_config, table))
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


def lengthen(text_config: Any, max_model_len: int) -> None:
    """Make a drafter's table as long as the served model's requests.

    vLLM hands the target's overrides to no drafter, and itself lengthens EAGLE's.
    """
    current = getattr(text_config, "max_position_embeddings", None)
    changes = longer_table(text_config, max_model_len)
    if not changes or current is None:
        return
    if current >= changes["max_position_embeddings"]:
        changes["max_position_embeddings"] = current
    for name, value in changes.items():
        setattr(text_config, name, value)


def _counted(text_config: Any, table: dict[str, Any]) -> float:
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


def own_configs(model_config: Any) -> tuple[Any, Any]:
    """The config of a model's files and its text config, without any override."""
    if not model_config.hf_overrides:
        return model_config.hf_config, model_config.hf_text_config
    return _load(
        model_config.hf_config_path or model_config.model,
        model_config.trust_remote_code,
        getattr(model_config, "_hf_config_revision", None) or model_config.revision,
        model_config.code_revision,
        model_config.config_format,
    )


@functools.lru_cache(maxsize=8)
def _load(
    model: str,
    trust_remote_code: bool,
    revision: str | None,
    code_revision: str | None,
    config_format: str,
) -> tuple[Any, Any]:
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    config = get_config(
        model, trust_remote_code, revision, code_revision, config_format
    )
    return config, get_hf_text_config(config)


def without_rotation(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides less all that a rotary table is made of."""
    kept = {}
    for name, value in overrides.items():
        if name in ROTATION_KEYS:
            continue
        if isinstance(value, dict) and value:
            value = without_rotation(value)
            if not value:
                continue
        kept[name] = value
    return kept


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


def main(arguments: list[str]) -> int:
    """Print the flag for a model and a length."""
    if len(arguments) != 2 or not arguments[1].isdigit():
        print("usage: python -m vllm_sink.policy.table_length MODEL MAX_MODEL_LEN")
        return 2
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where vLLM's log goes
            overrides = overrides_for(arguments[0], int(arguments[1]))
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    if overrides:
        print(flag(overrides))
    else:
        print("its own rotary table is long enough", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
