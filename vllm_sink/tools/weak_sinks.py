"""Models that may need no sink tokens, told from their attention modules.

Two designs weaken the first tokens' pull: a learned *sink logit* in the softmax's
denominator (not a token: it takes no cache), and a *gated attention output*, which lets
a head say nothing without a place to look at (arXiv 2505.06708). Whether a model
with either still needs sink tokens is measured, never assumed.
"""

from __future__ import annotations

from typing import Any


def by_design(model: Any) -> list[str]:
    """Designs of a loaded Transformers model that may make sink tokens unnecessary.

    Read off the modules that have a layer's index and an output projection: no list of
    architectures, which would be out of date.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "o_proj")
    ]
    found = []
    designs = {
        "learned sink logits": (_has_sink_logits, " (no tokens: they take no cache)"),
        "a gated attention output": (_has_gated_output, ""),
    }
    for name, (has, remark) in designs.items():
        count = sum(map(has, layers))
        if count:
            found.append(f"{name} in {count} of {len(layers)} layers{remark}")
    return found


def _has_sink_logits(attention: Any) -> bool:
    """Whether a module has a parameter with a number for each query head."""
    heads = attention.config.num_attention_heads
    own = dict(attention.named_parameters(recurse=False)).values()
    return any(tuple(parameter.shape) == (heads,) for parameter in own)


def _has_gated_output(attention: Any) -> bool:
    """Whether a module has a gate, or projects queries to twice the heads' width."""
    if any("gate" in name for name, _ in attention.named_children()):
        return True
    queries, width = getattr(attention, "q_proj", None), attention.o_proj.in_features
    return queries is not None and queries.out_features == 2 * width


def verdict(found: list[str], perplexities: dict[int, float]) -> list[str]:
    """Lines on the design, with S = 0, 1 and 4 as they were measured."""
    if not found:
        return []
    sizes = [size for size in (0, 1, 4) if size in perplexities]
    values = ", ".join(f"S = {size}: {perplexities[size]:.2f}" for size in sizes)
    return [
        f"The model has {' and '.join(found)}: it may need no sink tokens. Measured, "
        f"not assumed: perplexity at {values}."
    ]
