"""Which layers of a model the policy governs, read from its configuration.

Of a Hugging Face configuration of the decoder, as vLLM's and Transformers' own. What
is built is compared with it: :mod:`vllm_sink.cache.head_caches`.
"""

from __future__ import annotations

from typing import Any

# What a layer with full attention is called, beside Mamba in the same layer included.
GOVERNED = ("full_attention", "attention", "hybrid")
# What a layer that keeps nothing is called.
WITHOUT_CACHE = frozenset({"-", "E", "mlp", "moe"})
# Names of the list of kinds, and of Nemotron-H's string, in which * is attention.
LISTS = ("layer_types", "layers_block_type")
# Lists of numbers in their place, and the number of full attention: MiniMax, MiMo.
MARKS = {"attn_type_list": 1, "hybrid_layer_pattern": 0}


def layer_owners(text: Any, num_layers: int) -> tuple[int | None, ...]:
    """For each layer the one whose keys it reads under the policy.

    As a rule itself; None for a layer that is not governed. Empty where all layers
    are, and read their own.

    Args:
        text: The decoder's configuration.
    """
    kinds = layer_kinds(text, num_layers)
    if kinds is None:
        return ()
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    first = num_layers - shared if shared < num_layers else num_layers
    owners: list[int | None] = []
    for layer, kind in enumerate(kinds):
        if kind not in GOVERNED:
            owners.append(None)
        elif layer < first:
            owners.append(layer)
        else:  # the last layer of its kind that has keys of its own
            owners.append(max((i for i in range(first) if kinds[i] == kind), default=0))
    if owners == list(range(num_layers)):
        return ()
    return tuple(owners)


def layer_kinds(text: Any, num_layers: int) -> list[str] | None:
    """The kind of each layer, as its configuration calls it; None: it has no list."""
    for name in LISTS:
        kinds = getattr(text, name, None)
        if isinstance(kinds, (list, tuple)) and len(kinds) == num_layers:
            return list(kinds)
    for name, full in MARKS.items():
        marks = getattr(text, name, None)
        if isinstance(marks, (list, tuple)) and len(marks) == num_layers:
            return ["full_attention" if mark == full else "other" for mark in marks]
    pattern = getattr(text, "hybrid_override_pattern", None)
    if isinstance(pattern, str) and len(pattern) == num_layers:
        return ["full_attention" if mark == "*" else mark for mark in pattern]
    return None


def own_kv_heads(text: Any, layers: list[int]) -> int | None:
    """KV heads of these layers where a model's layers differ; None: as all."""
    if not getattr(text, "is_heterogeneous", False) or not layers:
        return None
    counts = {text.per_layer_config[i].num_key_value_heads for i in layers}
    return counts.pop() if len(counts) == 1 else None
