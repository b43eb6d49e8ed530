"""How the model rotated its keys: measured, or refused.

With ``sink_positions = "cache"`` the query is turned by
R(min(p, S+W-1)) R(p)^-1 before it meets the sink keys. That needs the rows of the
table that rotated *these* keys, which vLLM's attention layer does not know. They
are found by measurement, on the loaded model (``rotation_measure``); here is what
a measurement leaves behind.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sink.policy.table_length import max_model_len_remedy

_REMEDY = (
    "set additional_config.sink.sink_positions to 'absolute', which works with "
    "any rotation up to the trained length"
)


@dataclass(frozen=True)
class Rotation:
    """The table that rotated a layer's keys.

    Args:
        cos_sin_cache: [P, rotary_dim], row p = cos then sin of position p,
            both times the magnitude factor if there is one.
        is_neox: Pairs are (i, i + rotary_dim/2), else (2i, 2i + 1).
        name: Where the table is in the model.
    """

    cos_sin_cache: torch.Tensor
    is_neox: bool
    name: str = ""

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin_cache.shape[1]

    def turn(
        self, positions: torch.Tensor, budget: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of R(min(p, budget-1)) R(p)^-1.

        Args:
            positions: [T] int64, the queries' positions p.
            budget: S + W, tokens.

        Returns:
            Two [T, rotary_dim/2] float32 tensors. Free of the magnitude factor:
            both rows carry it, and it is divided out.
        """
        half = self.rotary_dim // 2
        near = self.cos_sin_cache[positions.clamp(max=budget - 1)].float()
        far = self.cos_sin_cache[positions].float()
        cos_n, sin_n = near[:, :half], near[:, half:]
        cos_f, sin_f = far[:, :half], far[:, half:]
        norm = cos_f * cos_f + sin_f * sin_f
        cos = (cos_n * cos_f + sin_n * sin_f) / norm
        sin = (sin_n * cos_f - cos_n * sin_f) / norm
        return cos, sin


@dataclass(frozen=True)
class Unknown:
    """A rotation that no table of the model explains.

    Args:
        seen: What was seen, as a clause.
    """

    seen: str


# attention layer -> what was measured; None: not rotated.
_measured: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def remember(layer: torch.nn.Module, found: Rotation | Unknown | None) -> None:
    """Keep what was measured of ``layer``, as long as it lives."""
    _measured[layer] = found


def is_measured(layer: torch.nn.Module) -> bool:
    """Whether :func:`find_rotation` has an answer, be it a refusal."""
    return layer in _measured


def measured_rotation(layer: torch.nn.Module) -> Rotation | None:
    """What was found; None also where nothing was measured, or nothing fits."""
    found = _measured.get(layer)
    return found if isinstance(found, Rotation) else None


def find_rotation(layer_name: str, layer: torch.nn.Module) -> Rotation | None:
    """The rotation of the keys of ``layer``; None: they are not rotated.

    Raises:
        ValueError: The rotation can't be told for certain.
    """
    found = _measured.get(layer, Unknown("it was not measured"))
    if isinstance(found, Unknown):
        raise ValueError(
            "sink_positions must be 'absolute' where the rotation of the keys can't "
            f"be told for certain, got 'cache' for {layer_name}: {found.seen}; "
            f"{_REMEDY}"
        )
    return found


def check_table(
    layer_name: str, rotation: Rotation, max_model_len: int, model_config: Any = None
) -> None:
    """Refuse a table that has no row for every position.

    Args:
        model_config: vLLM's, of the model that the layer is part of; None for a
            drafter.

    Raises:
        ValueError: Names what to add to the command.
    """
    rows = rotation.cos_sin_cache.shape[0]
    if rows < max_model_len:
        remedy = max_model_len_remedy(model_config, max_model_len, rows)
        raise ValueError(
            f"max_model_len must be <= {rows}, the rows of the rotary table of "
            f"{layer_name}, got {max_model_len}; {remedy}"
        )
