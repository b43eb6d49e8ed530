"""A Hugging Face model whose KV heads each obey a policy, or are watched.

Transformers calls :func:`headwise_attention` for every attention layer of a model
loaded by :func:`load`. What it does is said by the :class:`Headwise` in force
(``with Headwise(...):``); without one it is plain attention.

The weights of a layer exist only for a tile of queries at a time, and only where they
are watched: an 8B model needs no more than its own size and a few hundred MB.

Positions are ``absolute``: a query sees a sink at its true distance. Layers with a
window of their own keep it, whatever the policy.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.tools.heads.call import AttentionCall, Watch
from vllm_sink.tools.heads.shared import Continuation, Past
from vllm_sink.tools.reading import load_whole, reading

NAME = "vllm_sink_headwise"
WINDOWED = ("sliding_attention", "chunked_attention")


@dataclass
class Headwise:
    """A policy or a watch for each KV head, in force within ``with``; one at a time.

    Args:
        policy: Of the streaming heads; None: all heads are plain.
        retrieval: [L, HKV] bool, the heads that keep everything; None: no head.
        gates: [L, HKV] in [0, 1], instead of ``retrieval``: each head's output is
            gate x full attention's + (1 - gate) x streaming's (DuoAttention, arXiv
            2410.10819, section 2.2). Differentiable.
        watch: Called for each full-attention layer with (layer, weights
            [B, HKV, G, Q, K] fp32 of a tile of queries, first query); for one that
            reads another's keys, too.
        watch_from: The first query that is watched.
        past: Of layers whose cache hands out new keys alone: ``shared.continued``.
    """

    policy: RetentionPolicy | None = None
    retrieval: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    watch: Watch | None = None
    watch_from: int = 0
    past: Past = field(default_factory=dict)

    def __enter__(self) -> Headwise:
        assert _in_force.get() is None, "one Headwise at a time"
        _in_force.set(self)
        return self

    def __exit__(self, *_) -> None:
        _in_force.set(None)


# Transformers calls attention by a name and hands it nothing of ours.
_in_force: ContextVar[Headwise | None] = ContextVar("headwise", default=None)
_PLAIN = Headwise()


@dataclass(frozen=True)
class Layers:
    """The attention layers of a model, from their calls in a forward.

    Args:
        num_layers: Rows of a head map: the decoder's layers, whatever their kind.
        num_kv_heads: Columns of a head map.
        full: Indices of the layers that have a choice: full attention to keys of
            their own.
        readers: (layer, the one of ``full`` whose keys it reads): it follows that
            layer's heads (Gemma 3n, Gemma 4).
    """

    num_layers: int
    num_kv_heads: int
    full: tuple[int, ...]
    readers: tuple[tuple[int, int], ...] = ()

    @property
    def num_heads(self) -> int:
        """KV heads that have a choice."""
        return len(self.full) * self.num_kv_heads

    @property
    def free(self) -> torch.Tensor:
        """[L, HKV] bool: the heads that have a choice."""
        rows = torch.zeros(self.num_layers, self.num_kv_heads, dtype=torch.bool)
        rows[list(self.full)] = True
        return rows


def register() -> None:
    """Make ``attn_implementation=NAME`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, headwise_attention)
    AttentionMaskInterface.register(NAME, _bool_mask)


def load(name: str, *, dtype: str = "auto", device: str = "cpu", revision=None):
    """(model, tokenizer): the model's attention is :func:`headwise_attention`.

    Args:
        dtype: ``auto`` is the checkpoint's own.

    Raises:
        ValueError: It can't be read, not all of its weights are there, or the
            architecture does not let its attention be replaced.
    """
    import transformers

    register()
    with reading(name), _quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        model = load_whole(
            name, dtype=dtype, attn_implementation=NAME, revision=revision
        )
    model.requires_grad_(False)
    return model.to(device), tokenizer


@contextlib.contextmanager
def _quiet(transformers):
    """Hide transformers' progress bars, which would cut through the command's."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _bool_mask(*args: Any, **kwargs: Any):
    """The model's own mask as booleans, also where it is plainly causal."""
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def inspect(model, tokens: list[int]) -> Layers:
    """The model's layers, from one short forward pass.

    Raises:
        ValueError: No full-attention layer, or layers with different KV heads.
    """
    seen: dict[int, int] = {}

    def watch(layer: int, weights: torch.Tensor, _first: int) -> None:
        seen[layer] = weights.shape[1]

    with Headwise(watch=watch), torch.inference_mode():
        batch = torch.tensor([tokens[:8]], device=model.device)
        model(batch, use_cache=False)
    text_config = model.config.get_text_config()
    name = type(model).__name__
    if not seen:
        raise ValueError(
            f"model must have full-attention layers that transformers lets be replaced,"
            f" got none in {name}; a model whose layers all have windows needs no "
            "retrieval heads: serve it without --attention-backend sink"
        )
    if min(seen) < 0:  # Zamba2's, whose module has no layer's index
        raise ValueError(
            "model must have an attention module for each layer, got one that several "
            f"layers share in {name}; serve it without retrieval heads"
        )
    if len(set(seen.values())) > 1:
        raise ValueError(
            f"model must have as many KV heads in each full-attention layer, got "
            f"{sorted(set(seen.values()))} in {name}; choose whole layers with "
            "sink.retrieval_layers"
        )
    readers = {
        module.layer_idx: _owner(module)
        for module in model.modules()
        if getattr(module, "is_kv_shared_layer", False) and module.layer_idx in seen
    }
    own = sorted(seen.keys() - readers.keys())
    layers = max(text_config.num_hidden_layers, max(seen) + 1)
    heads = next(iter(seen.values()))
    return Layers(layers, heads, tuple(own), tuple(sorted(readers.items())))


def headwise_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function.

    Args:
        query: [B, H, Q, D], its last query at the last key's position.
        key, value: [B, HKV, K, D], H a multiple of HKV.
        attention_mask: [B, 1, Q, K] bool, used by layers with a window only: the
            prompts here have no padding that a query could see.
        s_aux: [H] sink logits (gpt-oss).

    Returns:
        [B, Q, H, D] and no weights.
    """
    headwise = _in_force.get() or _PLAIN
    layer = module.layer_idx
    owner = _owner(module)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = AttentionCall(query, key, value, scale, softcap, s_aux)
    if owner in headwise.past:
        past = headwise.past[owner]
        call = Continuation(query, key, value, scale, softcap, s_aux, *past)
    if _has_window(module, sliding_window):
        return call.plain(mask=attention_mask), None
    if headwise.watch is not None:
        call.watch(headwise.watch, layer, headwise.watch_from)
    if headwise.policy is None:
        return call.plain(), None
    if headwise.gates is not None:
        gate = headwise.gates[owner].repeat_interleave(call.group)[:, None]
        full, streaming = call.plain(), call.streaming(headwise.policy)
        gate = gate.to(full.dtype)
        return gate * full + (1 - gate) * streaming, None
    kept = torch.zeros(call.num_kv_heads, dtype=torch.bool)
    if headwise.retrieval is not None:
        kept = headwise.retrieval[owner].cpu()
    if kept.all():
        return call.plain(), None
    if not kept.any():
        return call.streaming(headwise.policy), None
    output = query.new_empty(call.shape)
    for heads, part in (
        (kept, lambda c: c.plain()),
        (~kept, lambda c: c.streaming(headwise.policy)),
    ):
        which = heads.repeat_interleave(call.group).to(query.device)
        output[:, :, which] = part(call.of_heads(heads.to(query.device), which))
    return output, None


def _owner(module) -> int:
    """The layer whose keys this layer reads; as a rule itself."""
    if not getattr(module, "is_kv_shared_layer", False):
        return module.layer_idx
    config = module.config
    kinds = config.layer_types
    own = kinds[: config.num_hidden_layers - config.num_kv_shared_layers]
    return max(i for i, kind in enumerate(own) if kind == kinds[module.layer_idx])


def _has_window(module, sliding_window: int | None) -> bool:
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None:
        return kinds[module.layer_idx] in WINDOWED
    return sliding_window is not None
