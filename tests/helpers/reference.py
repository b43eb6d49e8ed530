"""The independent reference: Hugging Face's own forward under a dense mask.

For any architecture, with a policy for each KV head. The model runs on copies of a
text in lock-step. All attend alike, so their hidden states stay the same; only their
position ids differ:

    copy 0    p                    its queries meet the window's keys
    copy 1    min(p, S + W - 1)    its queries meet the sinks' keys

which is the policy's turn, whatever the rotation, its pairing or its scaling: no
paging, no table, no angle and nothing of the code under test is used. Heads with
another window have a copy of their own; in ``absolute``, and where nothing is evicted,
copy 0 is all. Angles are computed in float64: a far position is as exact as a near one.
"""

import random
from functools import cached_property, partial
from typing import NamedTuple

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AutoTokenizer

NAME = "dense_reference"
QUERY_CHUNK = 256


class Seen(NamedTuple):
    """Keys of a head: the first ``sinks``, met by copy ``turned``, and a window."""

    sinks: int
    window: int
    turned: int = 0


class Run(NamedTuple):
    """The forward that is under way.

    Args:
        heads: [layers][KV heads] index into ``kinds``; None: the first of them.
        extra_window: Tokens added to windows of the model's own.
    """

    kinds: list[Seen]
    heads: list[list[int]] | None
    extra_window: int

    def of(self, module, head: int, own: int | None) -> Seen:
        if own is not None:
            return Seen(0, own + self.extra_window)
        kind = self.heads[module.layer_idx][head] if self.heads is not None else 0
        return self.kinds[kind]


_runs: list[Run] = []


def _attend(module, query, key, value, mask, scaling=None, **kwargs):
    """[C, H, T, D] -> [C, T, H, D], the same for all copies."""
    own = kwargs.get("sliding_window") or None
    if own is None and getattr(module, "is_sliding", False):
        own = module.sliding_window
    copies, num_heads, length, size = query.shape
    group = num_heads // key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    cap, logits = kwargs.get("softcap"), kwargs.get("s_aux")
    output = query.new_empty(length, num_heads, value.shape[-1])
    k = torch.arange(length)
    for head in range(key.shape[1]):
        seen = _runs[-1].of(module, head, own)
        rows = slice(head * group, (head + 1) * group)
        keys = key[0, head].T
        for start in range(0, length, QUERY_CHUNK):
            part = slice(start, start + QUERY_CHUNK)
            p = k[part, None]
            scores = query[0, rows, part] @ keys
            near = query[seen.turned, rows, part] @ keys[:, : seen.sinks]
            scores[..., : seen.sinks] = near
            scores *= scaling
            if cap:
                scores = torch.tanh(scores / cap) * cap
            kept = (k < seen.sinks) | (p - k < seen.window)
            scores = scores.masked_fill(~(kept & (k <= p)), float("-inf"))
            if logits is not None:
                extra = logits.reshape(-1)[rows, None, None]
                scores = torch.cat([scores, extra.expand(-1, len(p), 1)], -1)
            weights = torch.softmax(scores, -1)[..., :length]
            output[part, rows] = (weights @ value[0, head]).transpose(0, 1)
    return output.expand(copies, -1, -1, -1), None


AttentionInterface.register(NAME, _attend)


class _InDouble(TorchFunctionMode):
    """``float()`` gives float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **(kwargs or {}))


def _rotate_in_double(forward, *args, **kwargs):
    with _InDouble():
        return forward(*args, **kwargs)


def load(path, dtype=torch.float32, auto="AutoModelForCausalLM"):
    """The model in this folder, attending as the reference does."""
    model = getattr(transformers, auto).from_pretrained(
        path, dtype=dtype, attn_implementation=NAME
    )
    for module in model.modules():
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        if any(name.endswith("inv_freq") for name in buffers):
            module.forward = partial(_rotate_in_double, module.forward)
    return model.eval()


@torch.inference_mode()
def logits(
    model,
    tokens,
    sinks,
    window,
    positions="cache",
    extra_window=0,
    heads=None,
    retrieval_window=None,
    first_position=0,
) -> torch.Tensor:
    """[T, V] float32, of a model that :func:`load` returned.

    Args:
        extra_window: Tokens added to windows of the model's own.
        heads: [layers][KV heads], 1 for a retrieval head.
        retrieval_window: W of the retrieval heads; None: they keep everything.
        first_position: Of the text, for a text that lies far out.
    """
    at = torch.arange(len(tokens))
    everything = Seen(0, len(tokens))
    other = everything if retrieval_window is None else Seen(sinks, retrieval_window)
    copies, kinds = [at], []
    for kind in (Seen(sinks, window), other):
        budget = kind.sinks + kind.window
        if positions == "cache" and kind.sinks and budget < len(tokens):
            kind = kind._replace(turned=len(copies))
            copies.append(at.clamp(max=budget - 1))
        kinds.append(kind)
        if heads is None:
            break
    _runs.append(Run(kinds, heads, extra_window))
    try:
        found = model(
            torch.tensor([list(tokens)] * len(copies)),
            position_ids=torch.stack(copies) + first_position,
            use_cache=False,
        ).logits
    finally:
        _runs.pop()
    # Not in lock-step: the model has attention that did not come through here.
    assert (found - found[0]).abs().max() < 1e-3 * found.abs().max()
    return found[0].float()


def logprobs(model, tokens, *policy, **settings) -> torch.Tensor:
    """[T-1]: the log-probability of each token after the first."""
    chosen = torch.tensor(tokens[1:])[:, None]
    scores = logits(model, tokens, *policy, **settings)[:-1]
    return torch.log_softmax(scores, -1).gather(1, chosen)[:, 0]


class DenseReference:
    """A model's answers under (S, W)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.model = load(path)
        self._known: dict[tuple, torch.Tensor] = {}

    @cached_property
    def tokenizer(self):
        """The model's; a random model has none."""
        return AutoTokenizer.from_pretrained(self.path)

    def logits(self, tokens, sinks, window, positions="cache") -> torch.Tensor:
        return logits(self.model, tokens, sinks, window, positions)

    def logprobs(self, tokens, sinks, window, positions="cache") -> torch.Tensor:
        key = (tuple(tokens), sinks, window, positions)
        if key not in self._known:  # tests ask for the same texts again
            self._known[key] = logprobs(self.model, *key)
        return self._known[key]


class HeadsReference:
    """Answers under a head map, of the model that ``dense`` has loaded.

    Args: those of :func:`logits`.
    """

    def __init__(
        self,
        dense: DenseReference,
        heads,
        sinks,
        window,
        retrieval_window=None,
        positions="cache",
    ) -> None:
        self.model = dense.model
        self.policy = sinks, window, positions
        self.settings = {"heads": heads, "retrieval_window": retrieval_window}

    def logits(self, tokens) -> torch.Tensor:
        return logits(self.model, tokens, *self.policy, **self.settings)

    def logprobs(self, tokens) -> torch.Tensor:
        return logprobs(self.model, tokens, *self.policy, **self.settings)


def random_heads(
    num_retrieval: int, seed: int = 0, layers: int = 30, kv_heads: int = 3
) -> list[list[int]]:
    """A map with so many retrieval heads, of SmolLM2's shape if none is said."""
    flags = [1] * num_retrieval + [0] * (layers * kv_heads - num_retrieval)
    random.Random(seed).shuffle(flags)
    return [flags[kv_heads * i : kv_heads * (i + 1)] for i in range(layers)]


def whole_layers(*layers: int) -> list[list[int]]:
    return [[int(layer in layers)] * 3 for layer in range(30)]
