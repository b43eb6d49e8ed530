"""A check that overrides leave the rotation of the trained positions as it is.

``--hf-overrides`` lengthens a rotary table, and may change it: LongRoPE's magnitude and
dynamic NTK's base depend on ``max_position_embeddings``, and a table of another kind is
another rotation. Where an override changes what the table is made of, both rotary
modules are built as vLLM builds them, from the config of the model's files and from the
one in force, and turn the same vectors at positions that both have. Nothing of vLLM's
arithmetic is repeated here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_sink.rotation import table_length
from vllm_sink.rotation.rotary_rows import (
    longer_table,
    num_rows,
    own_max_model_len,
    rope_tables,
)
from vllm_sink.rotation.table_length import ROTATION_KEYS

if TYPE_CHECKING:
    import torch

# Two tables of one rotation differ by their frequencies' rounding to float32, which
# grows with the position, and by that of cos and sin.
_FREQUENCY, _ROW = 2**-21, 1e-5
_MOST_PROBED = 4096

# What vLLM itself takes out of a config or puts there, whoever wrote it.
_VLLMS_OWN = ("partial_rotary_factor", "rope_dim", "mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Change:
    """Overrides that rotate positions below the trained length in another way.

    Args:
        trained_length: Of the model's files, tokens.
        overrides: Those that the rotary table is made of, as shown to the user.
        effect: What they do to the rotation, as a clause.
        remedy: What to type instead.
    """

    trained_length: int
    overrides: str
    effect: str
    remedy: str


def changed_rotation(model: Any) -> Change | None:
    """The change of the model's rotation by ``--hf-overrides``, or None.

    Args:
        model: vLLM's ``ModelConfig``, before the model is built: some models change
            it as they are built.
    """
    overrides = getattr(model, "hf_overrides", None)
    if not overrides or (
        isinstance(overrides, dict) and not rotation_overrides(overrides)
    ):
        return None
    hf_config, text_config = table_length.own_configs(model)
    effect = rotation_change(
        text_config,
        model.hf_text_config,
        model.get_head_size(),
        model.max_model_len,
        _names(overrides),
    )
    if effect is None:
        return None
    shown, remedy = "a function", "have it leave them as they are"
    if isinstance(overrides, dict):
        shown = json.dumps(rotation_overrides(overrides))
        remedy = _remedy(model, hf_config, text_config)
    return Change(text_config.max_position_embeddings, shown, effect, remedy)


def rotation_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides that the rotary table is made of."""
    found: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in ROTATION_KEYS:
            found[name] = value
        elif isinstance(value, dict) and (inner := rotation_overrides(value)):
            found[name] = inner
    return found


def _remedy(model: Any, hf_config: Any, text_config: Any) -> str:
    """The flag to type instead, which was tried here."""
    kept = table_length.without_rotation(model.hf_overrides)
    rest = f"pass {table_length.flag(kept)}" if kept else "drop --hf-overrides"
    most = own_max_model_len(text_config)
    size, length = model.get_head_size(), model.max_model_len
    if length <= most:
        return rest
    longer = table_length.longer_overrides(hf_config, text_config, length, kept)
    changes = longer_table(text_config, length)
    if longer and changes:
        changed = SimpleNamespace(**{**_fields(text_config), **changes})
        if not rotation_change(text_config, changed, size, length, set(changes)):
            return f"pass {table_length.flag(longer)}"
    return f"{rest} and pass --max-model-len {most}"


def _fields(text_config: Any) -> dict[str, Any]:
    names = ("max_position_embeddings", "rope_parameters")
    return {name: getattr(text_config, name, None) for name in names}


def _names(overrides: Any) -> set[str]:
    """Every name in overrides, at any depth."""
    if not isinstance(overrides, dict):
        return set()
    inner = (_names(value) for value in overrides.values())
    return set(overrides).union(*inner)


def rotation_change(
    own: Any,
    changed: Any,
    head_size: int,
    max_model_len: int,
    given: Collection[str] = (),
) -> str | None:
    """The effect of another text config on the rotation, as a clause, or None.

    Args:
        own: The text config of the model's files.
        changed: The one in force.
        head_size: Of the attention heads.
        max_model_len: What is served under ``changed``.
        given: Names that were overridden.
    """
    before, after = rope_tables(own), rope_tables(changed)
    lengths = own.max_position_embeddings, changed.max_position_embeddings
    for kind, table in after.items():
        was = before.get(kind)
        if was is None:
            return f"which rotates {kind or 'all layers alike'}"
        for name in set(_VLLMS_OWN).difference(given):
            was.pop(name, None)
            if name in table:
                was[name] = table[name]
        if was == table and (
            lengths[0] == lengths[1] or was.get("rope_type", "default") == "default"
        ):
            continue
        rows = [num_rows(n, x) for n, x in zip(lengths, (was, table), strict=True)]
        positions = _probed(min(lengths[0], *rows))
        # The model as it is served without an override.
        limit = min(max_model_len, lengths[0])
        mine = _turned(head_size, lengths[0], was, limit, positions)
        theirs = _turned(head_size, lengths[1], table, max_model_len, positions)
        if mine is None or theirs is None:
            return None  # the one that can't be built ends the start by itself
        apart = (mine - theirs).abs().amax(-1)
        beyond = apart > _ROW + _FREQUENCY * positions
        if bool(beyond.any()):
            at = int((apart * beyond).argmax())
            return (
                f"which moves them by up to {float(apart[at]):.1e} at position "
                f"{int(positions[at])} ({table.get('rope_type', 'default')})"
            )
    return None


def _probed(count: int) -> torch.Tensor:
    """Positions below ``count``, all small ones and the powers of two."""
    import torch

    few = set(range(min(count, 16))) | {2**n for n in range(4, 32)}
    few |= {p - 1 for p in (count, min(count, _MOST_PROBED))}
    return torch.tensor(sorted(p for p in few if 0 <= p < count))


def _turned(
    head_size: int,
    length: int,
    table: dict[str, Any],
    max_model_len: int,
    positions: torch.Tensor,
) -> torch.Tensor | None:
    """[P, head_size]: a vector of ones, turned by vLLM's rotary module."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers import rotary_embedding

    settings = _settings()
    # All that a rotary module reads of it; LongRoPE chooses its factors by it.
    settings.model_config = SimpleNamespace(max_model_len=max_model_len)
    ones = torch.ones(len(positions), head_size)
    built = getattr(rotary_embedding, "_ROPE_DICT", {})
    before = dict(built)
    try:
        with set_current_vllm_config(settings), torch.device("cpu"), torch.no_grad():
            rotary = rotary_embedding.get_rope(
                head_size, length, rope_parameters=table, dtype=torch.float32
            )
            turn = getattr(rotary, "forward_native", rotary.forward)
            query, _ = turn(positions, ones, ones.clone())
            return query.double()
    except Exception as error:
        init_logger("vllm.plugins.sink").warning(
            "A rotary table of %s could not be built to compare: %r", table, error
        )
        return None
    finally:  # vLLM keeps every table that it made
        built.clear()
        built.update(before)


@functools.cache
def _settings() -> Any:
    """The context in which vLLM's modules are built: none of the engine's settings."""
    from vllm.config import VllmConfig

    return VllmConfig()
