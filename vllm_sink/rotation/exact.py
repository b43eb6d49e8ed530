"""Exact angles where positions exceed the trained length.

Models build their tables in float32: the angle p * frequency is wrong by 0.06 at a
million, and keys rotated by wrong angles are at wrong distances. Here the tables
that rotate queries and keys get angles computed in float64, rounded once. A stored
table's frequencies are read off its own rows, so any scaling comes along; its first
rows must come out as they were, or it is left alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_sink.engine import Engine
from vllm_sink.rotation.table import RotaryTable
from vllm_sink.rotation.table_length import own_configs

logger = init_logger("vllm.plugins.sink")

_CHUNK = 1 << 16  # rows at a time: float64 angles of 64 pairs are 32 MiB
_MOST_READ = 1 << 16  # rows that the frequencies are read from


def trained_length(engine: Engine) -> int:
    """The model's trained length, whatever was overridden for this engine."""

    def read() -> int:
        _, text = own_configs(engine.vllm_config.model_config)
        return int(getattr(text, "max_position_embeddings", 0) or 0)

    return engine.once("trained length", read)


def make_exact(
    root: torch.nn.Module, table: RotaryTable, num_trained: int, num_positions: int
) -> RotaryTable | None:
    """Give ``table`` exact angles, in place; None where that can't be done.

    Args:
        root: The model that holds it.
        num_trained: Positions whose rows are right to rounding as they are.
        num_positions: Positions that are served.

    Returns:
        The table that is in use from now on.
    """
    if table.rows is None:
        return _replace_module(root, table, num_positions)
    rows = table.rows
    known = rows[: min(num_trained, len(rows), _MOST_READ)].double()
    frequencies, magnitude = read_frequencies(known, rows.dtype)
    before = known.float()
    after = _rows(torch.arange(len(known), device=rows.device), frequencies, magnitude)
    # What float32 angles are wrong by, and rounding to the table's type.
    at = torch.arange(len(known), device=rows.device).double()[:, None]
    allowed = (at * frequencies.abs() * 2**-23).repeat(1, 2)
    allowed = magnitude.repeat(2) * (allowed + 2 * torch.finfo(rows.dtype).eps)
    if bool(((after - before).abs() > allowed).any()):
        logger.warning(
            "%s is left as it is: its angles don't grow evenly with the position, so "
            "exact ones can't be computed",
            table.name,
        )
        return None
    write_rows(rows, frequencies, magnitude)
    logger.info("%s holds exact angles now, of %d positions", table.name, len(rows))
    return table


def read_frequencies(
    rows: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies and magnitudes [R/2] of a table's first rows [N, R], float64.

    The angle of row 1 is the frequency to the table's precision; that of row 2, 4,
    8, … is known up to full turns, which the estimate so far tells, and halves the
    error each time. The fit over all rows then averages their rounding.
    """
    half = rows.shape[1] // 2
    cos, sin = rows[:, :half], rows[:, half:]
    magnitude = rows[:1, :half].abs().squeeze(0)
    angles = torch.atan2(sin, cos)
    estimate = angles[1] if len(rows) > 1 else torch.zeros_like(angles[0])
    position = 2
    while position < len(rows):
        estimate = _unwrap(angles[position], position * estimate) / position
        position *= 2
    at = torch.arange(len(rows), device=rows.device).double()[:, None]
    whole = _unwrap(angles, at * estimate)
    fitted = (at * whole).sum(0) / (at * at).sum(0).clamp(min=1)
    if dtype == torch.float32:
        fitted = fitted.float().double()  # as the model rounded them
    return fitted, magnitude


def _unwrap(angle: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """The angle plus full turns that is nearest to ``near``."""
    return angle + 2 * math.pi * torch.round((near - angle) / (2 * math.pi))


def _rows(
    positions: torch.Tensor, frequencies: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    """[N, R] float64: cos then sin of float64 angles."""
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.cos() * magnitude, angles.sin() * magnitude], -1)


def write_rows(
    table: torch.Tensor, frequencies: torch.Tensor, magnitude: torch.Tensor
) -> None:
    """Fill ``table`` [P, R] in place; each entry is rounded once."""
    for start in range(0, len(table), _CHUNK):
        stop = min(start + _CHUNK, len(table))
        positions = torch.arange(start, stop, device=table.device)
        table[start:stop] = _rows(positions, frequencies, magnitude).to(table.dtype)


class ExactRotary(torch.nn.Module):
    """A Hugging Face rotary module that reads rows of a table instead of angles.

    Args:
        table: [P, R], cos then sin.
        spread: How the module spreads R/2 columns over R dimensions.
    """

    def __init__(self, table: torch.Tensor, spread: str) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", table, persistent=False)
        self.cos_sin_cache: torch.Tensor
        self.spread = spread

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., T, R] of ``position_ids`` [..., T], in x's dtype."""
        cos, sin = self.cos_sin_cache[position_ids].to(x.dtype).chunk(2, -1)
        return _spread(cos, self.spread), _spread(sin, self.spread)


def _spread(columns: torch.Tensor, how: str) -> torch.Tensor:
    if how == "halves":
        return torch.cat([columns, columns], -1)
    return columns.repeat_interleave(2, -1)


def _replace_module(
    root: torch.nn.Module, table: RotaryTable, num_positions: int
) -> RotaryTable | None:
    """Put an :class:`ExactRotary` where ``table``'s module is."""
    path, _, name = table.name.rpartition(".")
    exact = _exact_rotary(table, num_positions) if name == "inv_freq" else None
    if exact is None:
        logger.warning(
            "%s is left as it is: its module's results are not plain rows of angles, "
            "so exact ones can't take their place",
            table.name,
        )
        return None
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, exact)
    logger.info(
        "%s gives way to a table of exact angles, of %d positions",
        path,
        len(exact.cos_sin_cache),
    )
    where = f"{path}.cos_sin_cache"
    return RotaryTable(exact.cos_sin_cache, table.is_neox, where, exact)


def _exact_rotary(table: RotaryTable, num_positions: int) -> ExactRotary | None:
    """A module that returns what ``table``'s does at small positions."""
    assert table.frequencies is not None
    frequencies = table.frequencies.double()
    magnitude = torch.full_like(frequencies, table.scaling)
    shape = (num_positions, table.rotary_dim)
    rows = table.frequencies.new_empty(shape, dtype=table.dtype)
    write_rows(rows, frequencies, magnitude)
    ids = torch.arange(min(8, len(rows)), device=rows.device)[None]
    x = torch.empty(0, dtype=table.dtype, device=rows.device)
    with torch.no_grad():
        try:
            want = table.module(x, ids)  # type: ignore[misc]
        except Exception:
            return None
    for spread in ("halves", "neighbours"):
        exact = ExactRotary(rows, spread)
        got = exact(x, ids)
        if _alike(want, got, 4 * torch.finfo(table.dtype).eps):
            return exact
    return None


def _alike(want: Any, got: tuple[torch.Tensor, torch.Tensor], tolerance: float) -> bool:
    if not isinstance(want, tuple) or len(want) != 2:
        return False
    return all(
        isinstance(a, torch.Tensor)
        and a.shape == b.shape
        and bool(((a.float() - b.float()).abs() <= tolerance * (1 + b.abs())).all())
        for a, b in zip(want, got, strict=True)
    )
