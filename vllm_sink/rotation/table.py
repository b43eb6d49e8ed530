"""Rotary tables: rows of angles by position, and the turn between two of them.

With ``sink_positions = "cache"`` the query is turned by
R(min(p, S+W-1)) R(p)^-1 before it meets the sink keys. That needs the rows of the
table that rotates *these* keys, which vLLM's attention layer does not know. They
are found by measurement, on the loaded model (:mod:`vllm_sink.rotation.measure`),
which leaves a :class:`RotaryTable` or an :class:`Unknown` for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_sink.engine import Engine
from vllm_sink.rotation.table_length import max_model_len_remedy

_REMEDY = (
    "set additional_config.sink.sink_positions to 'absolute', which works with "
    "any rotation up to the trained length"
)


_CHUNK = 1 << 16  # rows written down at a time


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """A table of rows by which a model rotates queries and keys.

    Args:
        rows: [P, rotary_dim], row p = cos then sin of position p, both times the
            magnitude factor if there is one. None where the model computes them.
        is_neox: Pairs are (i, i + rotary_dim/2), else (2i, 2i + 1).
        name: Where it is in the model.
        module: The module that holds it.
        frequencies: [rotary_dim/2], of computed rows. scaling: their magnitude.
        dtype: Of computed rows.
    """

    rows: torch.Tensor | None
    is_neox: bool
    name: str = ""
    module: torch.nn.Module | None = None
    frequencies: torch.Tensor | None = None
    scaling: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def num_rows(self) -> int | None:
        """Positions that it has a row for; None: any."""
        return None if self.rows is None else self.rows.shape[0]

    @property
    def rotary_dim(self) -> int:
        """Dimensions that it rotates: the first ones of a head."""
        if self.rows is not None:
            return self.rows.shape[1]
        assert self.frequencies is not None, "a table is stored or computed"
        return 2 * len(self.frequencies)

    def read(self, positions: torch.Tensor) -> torch.Tensor:
        """[P] int64 positions -> [P, rotary_dim] rows."""
        if self.rows is not None:
            return self.rows[positions.to(self.rows.device)]
        assert self.frequencies is not None, "a table is stored or computed"
        at = positions.to(self.frequencies.device)
        angles = at.float()[:, None] * self.frequencies.float()
        rows = torch.cat([angles.cos(), angles.sin()], -1) * self.scaling
        return rows.to(self.dtype)

    def stored(self, num_positions: int) -> RotaryTable:
        """This table with its rows stored: itself, or a copy with rows computed."""
        if self.rows is not None:
            return self
        assert self.frequencies is not None, "a table is stored or computed"
        shape = (num_positions, self.rotary_dim)
        rows = self.frequencies.new_empty(shape, dtype=self.dtype)
        for start in range(0, num_positions, _CHUNK):
            stop = min(start + _CHUNK, num_positions)
            rows[start:stop] = self.read(torch.arange(start, stop))
        return replace(self, rows=rows)

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
        near = self.read(positions.clamp(max=budget - 1)).float()
        far = self.read(positions).float()
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


def measured_rotation(engine: Engine, layer: torch.nn.Module) -> RotaryTable | None:
    """The measured table; None also where nothing was measured, or nothing fits."""
    found = engine.rotations.get(layer)
    return found if isinstance(found, RotaryTable) else None


def find_rotation(
    engine: Engine, layer_name: str, layer: torch.nn.Module
) -> RotaryTable | None:
    """The rotation of the keys of ``layer``; None: they are not rotated.

    Raises:
        ValueError: The rotation can't be told for certain.
    """
    found = engine.rotations.get(layer, Unknown("it was not measured"))
    if isinstance(found, Unknown):
        raise ValueError(
            "sink_positions must be 'absolute' where the rotation of the keys can't "
            f"be told for certain, got 'cache' for {layer_name}: {found.seen}; "
            f"{_REMEDY}"
        )
    return found


def check_table(
    layer_name: str, rotation: RotaryTable, max_model_len: int, model_config: Any = None
) -> None:
    """Refuse a table that has no row for every position.

    Args:
        model_config: vLLM's, of the model that the layer is part of; None for a
            drafter.

    Raises:
        ValueError: Names what to add to the command.
    """
    rows = rotation.num_rows
    if rows is not None and rows < max_model_len:
        remedy = max_model_len_remedy(model_config, max_model_len, rows)
        raise ValueError(
            f"max_model_len must be <= {rows}, the rows of the rotary table of "
            f"{layer_name}, got {max_model_len}; {remedy}"
        )
