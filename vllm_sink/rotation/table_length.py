"""Overrides with which vLLM builds a rotary table with a row for every position.

    python -m vllm_sink.rotation.table_length MODEL 1000000

prints the flag that a model needs. vLLM sizes the table by the model's config, so a
longer one takes an override of it (``--hf-overrides``). Which one depends on the kind
of rotation; those here leave the rotation of every position exactly as it was and only
add rows.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import sys
from typing import Any

from vllm_sink.rotation.rotary_rows import longer_table, own_max_model_len

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
    """The remedy for a command that asks for more positions than a table has rows.

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
    """``others``, and overrides that make the table long enough; None without any.

    Args:
        hf_config, text_config: As the model's files have them.
        others: Overrides of what the table is not made of.
    """
    if max_model_len <= own_max_model_len(text_config):
        return others or {}
    changes = longer_table(text_config, max_model_len)
    placed = changes and _at(hf_config, text_config, changes)
    return _merge(others or {}, placed) if placed else None


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
    """Overrides without those that a rotary table is made of."""
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
        print("usage: python -m vllm_sink.rotation.table_length MODEL MAX_MODEL_LEN")
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
