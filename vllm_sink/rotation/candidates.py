"""The tables of a model that may rotate a layer, and how well each fits.

Rows at position p differ from the row at position 0 by R(p) R(0)^-1. A
:class:`RotaryTable` predicts that from its own rows; it explains what was seen if
every pair of dimensions, at every probed position, is where it predicts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm_sink.rotation.table import RotaryTable

# A difference of rows counts up to this part of their length, per pair of
# dimensions; in bf16 a pair is rounded by about 0.006 of its length.
_ROUNDING = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float32: 1e-3}
# Pairs shorter than this part of the typical pair are measured against it.
_SHORT_PAIR = 0.05


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding to ``dtype`` explains."""
    return _ROUNDING.get(dtype, 0.03)


def tables_of(
    modules: list[tuple[str, torch.nn.Module]], head_size: int, dtype: torch.dtype
) -> Iterator[RotaryTable]:
    """All tables in ``modules`` that could rotate heads of ``head_size``.

    Stored rows first; then those from a later row on, one that the module names by
    a number (LongRoPE keeps two tables in one buffer); then frequencies, which
    Hugging Face's modules turn into angles as they go. The order matters: where
    angles grow evenly, rows from any row on rotate alike.
    """
    later: list[RotaryTable] = []
    for path, module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            where = f"{path}.{name}" if path else name
            if _is_table(buffer, head_size):
                yield from _stored(where, module, buffer, 0)
                for start in sorted(
                    {
                        value
                        for value in vars(module).values()
                        if type(value) is int and 0 < value < buffer.shape[0]
                    }
                ):
                    later.extend(_stored(where, module, buffer, start))
            elif _is_frequencies(name, buffer, head_size):
                later.extend(_computed(where, module, name, buffer, dtype))
    yield from later


def _is_table(buffer: torch.Tensor, head_size: int) -> bool:
    return (
        buffer.ndim == 2
        and buffer.is_floating_point()
        and buffer.shape[0] > 1
        and buffer.shape[1] % 2 == 0
        and 0 < buffer.shape[1] <= head_size
    )


def _is_frequencies(name: str, buffer: torch.Tensor, head_size: int) -> bool:
    named = name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    return named and buffer.ndim == 1 and 0 < 2 * buffer.shape[0] <= head_size


def _stored(
    where: str, module: torch.nn.Module, buffer: torch.Tensor, start: int
) -> Iterator[RotaryTable]:
    if start:
        where = f"{where}[{start}:]"
    for is_neox in (True, False):
        yield RotaryTable(buffer[start:], is_neox, where, module)


def _computed(
    where: str,
    module: torch.nn.Module,
    name: str,
    frequencies: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[RotaryTable]:
    prefix = name.removesuffix("inv_freq")
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    for is_neox in (True, False):
        yield RotaryTable(None, is_neox, where, module, frequencies, scaling, dtype)


def misfit(
    seen: torch.Tensor, positions: torch.Tensor, table: RotaryTable | None
) -> tuple[float, int]:
    """The largest distance of rows from ``table``'s prediction, and its position.

    Args:
        seen: [G, P, H, D] float32; G tokens at P positions, the first of them 0.
        positions: [P] int64.
        table: None predicts that all positions are alike.

    Returns:
        The largest difference of a pair of dimensions as a part of its length, or
        of all of a position's rows in length alone, whichever is further beyond
        rounding; the latter counts four times, for rounding is averaged there.
    """
    first = seen[:, :1].double()
    num_rows = None if table is None else table.num_rows
    if num_rows is not None and num_rows <= positions.max():
        return float("inf"), int(positions.max())
    if table is None:
        predicted = first.expand_as(seen)
        dim, is_neox = 0, True
    else:
        dim, is_neox = table.rotary_dim, table.is_neox
        rows = table.read(positions).double().cpu()
        cos, sin = rows[:, : dim // 2], rows[:, dim // 2 :]
        norm = cos[0] ** 2 + sin[0] ** 2
        if not bool((norm > 0).all()):
            return float("inf"), 0
        turned_cos = (cos * cos[0] + sin * sin[0]) / norm
        turned_sin = (sin * cos[0] - cos * sin[0]) / norm
        predicted = _rotate(first, turned_cos, turned_sin, is_neox)
    error = _by_pair((seen - predicted) ** 2, dim, is_neox)
    length = _by_pair(predicted**2, dim, is_neox)
    floor = _SHORT_PAIR**2 * length.mean(-1, keepdim=True)
    if not bool((length.sum(-1) > 0).all()):
        return float("inf"), 0
    pairs = (error / torch.maximum(length, floor)).amax(-1).sqrt()
    along = (seen * predicted).sum((0, 2, 3)) / (predicted**2).sum((0, 2, 3))
    worst = torch.maximum(pairs, 4 * (along - 1).abs())
    at = int(worst.argmax())
    return float(worst[at]), int(positions[at])


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    """[G, 1, H, D] by [P, R/2] -> [G, P, H, D]; dimensions past R stay."""
    cos, sin = cos[:, None], sin[:, None]
    dim = 2 * cos.shape[-1]
    head, rest = x[..., :dim], x[..., dim:]
    if is_neox:
        a, b = head.chunk(2, -1)
    else:
        a, b = head[..., ::2], head[..., 1::2]
    a, b = a * cos - b * sin, b * cos + a * sin
    head = torch.cat([a, b], -1) if is_neox else torch.stack([a, b], -1).flatten(-2)
    rest = rest.expand(*head.shape[:-1], rest.shape[-1])
    return torch.cat([head, rest], -1)


def _by_pair(squares: torch.Tensor, dim: int, is_neox: bool) -> torch.Tensor:
    """[G, P, H, D] -> [P, R/2 + D - R]: sums over tokens, heads and pairs."""
    summed = squares.sum((0, 2))
    head, rest = summed[:, :dim], summed[:, dim:]
    shape = (2, dim // 2) if is_neox else (dim // 2, 2)
    head = head.unflatten(-1, shape).sum(1 if is_neox else 2)
    return torch.cat([head, rest], -1)
