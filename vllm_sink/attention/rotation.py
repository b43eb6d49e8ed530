"""How the model rotated its keys: certain, or refused.

With ``sink_positions = "cache"`` the query is turned by
R(min(p, S+W-1)) R(p)^-1 before it meets the sink keys. That needs the cos/sin
table that rotated *these* keys. vLLM's attention layer does not know it; the
module that owns the layer does (``self.rotary_emb`` beside ``self.attn``).

The owner is found through torch's public registration hook, so nothing of vLLM
is patched. Whether the owner really rotates the q and k that it hands to this
layer is read off its ``forward``: it must contain, unconditionally,
``q, k = self.rotary_emb(positions, q, k)`` followed by ``self.attn(q, k, v)``
with q and k untouched in between. Anything else (NoPE layers chosen by a flag,
multi-dimensional or length-dependent rotations, scaling after the rotation) is
refused: a wrong turn is silent corruption.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from dataclasses import dataclass

import torch

# Rotations that are a fixed table, one row a position; each read in vLLM 0.32.
# The magnitude factor of YaRN stands in its rows.
_TABLE_ROTATIONS = frozenset(
    {
        "RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "Llama3RotaryEmbedding",
        "NTKScalingRotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
    }
)

_REMEDY = (
    "set additional_config.sink.sink_positions to 'absolute', which works with "
    "any rotation up to the trained length"
)

# attention layer -> the module that owns it
_owners: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_recording = False


def record_parents() -> None:
    """Remember, from now on, which module owns each attention layer; idempotent."""
    global _recording
    if _recording:
        return
    _recording = True

    def remember(parent: torch.nn.Module, name: str, child) -> None:
        if child is not None and hasattr(child, "attn_backend"):
            _owners[child] = weakref.ref(parent)

    torch.nn.modules.module.register_module_module_registration_hook(remember)


@dataclass(frozen=True)
class Rotation:
    """The table that rotated a layer's keys.

    Args:
        cos_sin_cache: [P, rotary_dim], row p = cos then sin of position p,
            both times the magnitude factor if there is one.
        is_neox: Pairs are (i, i + rotary_dim/2), else (2i, 2i + 1).
    """

    cos_sin_cache: torch.Tensor
    is_neox: bool

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


def find_rotation(layer_name: str, layer: torch.nn.Module) -> Rotation:
    """The rotation of the keys of ``layer``.

    Raises:
        ValueError: The rotation can't be told for certain.
    """
    owner_ref = _owners.get(layer)
    owner = owner_ref() if owner_ref is not None else None
    if owner is None:
        raise _unknown(layer_name, "the module that owns it was not seen")
    rotary = getattr(owner, "rotary_emb", None)
    kind = type(rotary).__name__
    if rotary is None:
        raise _unknown(layer_name, f"{type(owner).__name__} has no rotary_emb")
    if kind not in _TABLE_ROTATIONS:
        raise _unknown(layer_name, f"its rotary embedding is a {kind}")
    if not rotates_unconditionally(type(owner)):
        raise _unknown(
            layer_name,
            f"{type(owner).__name__}.forward does not plainly rotate q and k",
        )
    return Rotation(rotary.cos_sin_cache, rotary.is_neox_style)


def check_table(layer_name: str, rotation: Rotation, max_model_len: int) -> None:
    """Refuse a table that has no row for every position.

    Raises:
        ValueError: Names the flag that makes vLLM build a longer table.
    """
    rows = rotation.cos_sin_cache.shape[0]
    if rows < max_model_len:
        raise ValueError(
            f"max_model_len must be <= {rows}, the rows of the rotary table of "
            f"{layer_name}, got {max_model_len}; pass --hf-overrides "
            f"'{{\"max_position_embeddings\": {max_model_len}}}' so that vLLM "
            "builds a longer table"
        )


def rotates_unconditionally(owner: type) -> bool:
    """Whether ``owner.forward`` rotates q and k and hands them on untouched."""
    try:
        source = textwrap.dedent(inspect.getsource(owner.forward))  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef), function
    rotated = False
    for statement in function.body:
        text = ast.unparse(statement)
        if text == "q, k = self.rotary_emb(positions, q, k)":
            if rotated:
                return False
            rotated = True
            continue
        calls_attention = any(
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "self.attn"
            and [ast.unparse(arg) for arg in node.args[:2]] == ["q", "k"]
            for node in ast.walk(statement)
        )
        if calls_attention:
            return rotated
        if rotated and _assigns(statement, {"q", "k"}):
            return False
    return False


def _assigns(statement: ast.stmt, names: set[str]) -> bool:
    return any(
        isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Store)
        and node.id in names
        for node in ast.walk(statement)
    )


def _unknown(layer_name: str, why: str) -> ValueError:
    return ValueError(
        "sink_positions must be 'absolute' where the rotation of the keys can't be "
        f"told for certain, got 'cache' for {layer_name}: {why}; {_REMEDY}"
    )
