"""One forward of a loaded model in which attention adds nothing.

The same few tokens stand at several positions, every attention layer returns
zeros, and the q and k that reach it are kept. What differs between positions is
then the rotation alone: no token sees another one, and nothing but the rotary
module reads ``positions``; learned embeddings of positions are held still. Mamba,
linear-attention and convolution layers return zeros as well: without metadata vLLM's
leave their output as ``torch.empty`` made it, another one for every row.

The forward is the model's own, eager, without attention metadata, as when vLLM
profiles memory: no KV cache is touched, nothing is compiled or captured.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.sequence import IntermediateTensors

# Of the vocabulary, where the probed tokens are. Several, because a row of the
# embedding may be zero (padding, never trained), and zero shows no rotation.
_TOKENS = (0.21, 0.52, 0.83)


@dataclass(frozen=True)
class Seen:
    """The q and k that reached one attention layer: rows of tokens x positions.

    Args:
        query, key: [G, P, heads, D] float32 on the CPU, G tokens at P positions.
            key is None where the layer reads another layer's cache.
        noise: The largest difference between rows of one token at one position,
            as a part of their length; not 0 where a row hears of its neighbours.
    """

    query: torch.Tensor
    key: torch.Tensor | None
    noise: float


def probe(
    root: torch.nn.Module,
    layers: dict[str, Any],
    vllm_config: VllmConfig,
    positions: list[int],
) -> dict[str, Seen]:
    """Run ``root`` with tokens at ``positions``; q and k of each layer.

    Args:
        root: A whole model: target or drafter.
        layers: Its attention layers by name.
        positions: P positions; the rows are those of the first token, of the
            second, …, and each token at the first position once more.
    """
    tokens = len(_TOKENS)
    which = torch.arange(tokens).repeat_interleave(len(positions))
    which = torch.cat([which, torch.arange(tokens)])
    at = torch.tensor(positions * tokens + positions[:1] * tokens)
    with (
        _recorded(layers) as rows,
        _held_embeddings(root, layers, vllm_config, at),
        _held_states(root),
    ):
        _forward(root, vllm_config, which, at)
    missing = sorted(set(layers) - set(rows))
    assert not missing, f"the forward did not reach {missing}"
    return {
        name: _arrange(query, key, tokens, len(positions))
        for name, (query, key) in rows.items()
    }


def count_rows(
    root: torch.nn.Module, layers: dict[str, Any], vllm_config: VllmConfig, tokens: int
) -> dict[str, tuple[int, int | None]]:
    """Run ``root`` with ``tokens`` tokens; rows of q and of k that reach each layer.

    The rows of k are None where the layer reads another layer's cache.
    """
    which = torch.arange(tokens) % len(_TOKENS)
    with _recorded(layers) as rows, _held_states(root):
        _forward(root, vllm_config, which, torch.zeros_like(which))
    return {
        name: (len(query), None if key is None else len(key))
        for name, (query, key) in rows.items()
    }


def difference(one: Seen, other: Seen) -> float:
    """The largest difference of two forwards at their common first position."""
    apart = 0.0
    for a, b in ((one.query, other.query), (one.key, other.key)):
        if a is not None and b is not None:
            length = max(a[:, 0].norm().item(), 1e-30)
            apart = max(apart, (a[:, 0] - b[:, 0]).norm().item() / length)
    return apart


def _arrange(
    query: torch.Tensor, key: torch.Tensor | None, tokens: int, count: int
) -> Seen:
    noise = 0.0
    parts: list[torch.Tensor | None] = []
    for rows in (query, key):
        if rows is None:
            parts.append(None)
            continue
        rows = rows.float().cpu()
        assert len(rows) == (tokens * (count + 1)), (
            f"{len(rows)} rows of {tuple(rows.shape[1:])} for {tokens * (count + 1)} "
            "tokens: vLLM's number of heads (num_key_value_heads of the config?) is "
            "not the model's"
        )
        grid = rows[: tokens * count].unflatten(0, (tokens, count))
        again = rows[tokens * count :]
        length = again.norm().item()
        if length > 0:
            noise = max(noise, (grid[:, 0] - again).norm().item() / length)
        parts.append(grid)
    assert parts[0] is not None
    return Seen(parts[0], parts[1], noise)


@contextlib.contextmanager
def _recorded(layers: dict[str, Any]) -> Iterator[dict[str, tuple]]:
    """While active, attention returns zeros and its q and k are kept by layer."""
    rows: dict[str, tuple] = {}

    def recorder(name: str, keeps_key: bool):
        def forward(layer, query, key, value, kv_cache, attn_metadata, output, **_):
            keep = key.clone() if keeps_key and key is not None else None
            rows[name] = (query.clone(), keep)
            return output.zero_()

        return forward

    try:
        for name, layer in layers.items():
            layer.impl.forward = recorder(name, layer.impl.writes_cache)
        yield rows
    finally:
        for layer in layers.values():
            layer.impl.__dict__.pop("forward", None)


@contextlib.contextmanager
def _hooked(root: torch.nn.Module, kinds: Any, hook: Any) -> Iterator[None]:
    """While active, modules of these classes return what ``hook`` returns."""
    hooks = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in root.modules()
        if isinstance(module, kinds)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextlib.contextmanager
def _held_embeddings(
    root: torch.nn.Module,
    layers: dict[str, Any],
    vllm_config: VllmConfig,
    positions: torch.Tensor,
) -> Iterator[None]:
    """While active, learned embeddings return those of the first position.

    They are a part of the token's content and rotate nothing. Held are embeddings
    that are given the positions and answer a whole hidden state, wider than any
    head: a table of angles that is read as an embedding still counts as a rotation.
    """
    width = vllm_config.model_config.get_hidden_size()
    if width <= max((layer.head_size for layer in layers.values()), default=0):
        yield
        return

    def hold(module, args, kwargs, output):
        at = args[0].flatten().cpu() if args else positions[:0]
        if not torch.equal(at, positions) or output.shape[-1] != width:
            return output
        rows = output.reshape(-1, width)
        return rows[:1].expand_as(rows).clone().view_as(output)

    with _hooked(root, (torch.nn.Embedding, VocabParallelEmbedding), hold):
        yield


@contextlib.contextmanager
def _held_states(root: torch.nn.Module) -> Iterator[None]:
    """While active, layers that carry a state between tokens return zeros."""

    def zero(module, args, kwargs, result):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if isinstance(written := given.get("output"), torch.Tensor):
            written.zero_()
        return torch.zeros_like(result) if isinstance(result, torch.Tensor) else None

    with _hooked(root, MambaBase, zero):
        yield


@torch.no_grad()
def _forward(
    root: torch.nn.Module,
    vllm_config: VllmConfig,
    which: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Run the whole model on rows of token number ``which`` at ``positions``."""
    device = torch.device(vllm_config.device_config.device)
    model_config = vllm_config.model_config
    vocabulary = model_config.get_vocab_size()
    ids = torch.tensor([int(part * vocabulary) for part in _TOKENS])[which]
    ids, positions = ids.to(device), positions.to(device)
    count = len(which)
    takes = inspect.signature(root.forward).parameters
    arguments: dict[str, Any] = {"input_ids": ids, "positions": positions}
    if model_config.uses_mrope and "hidden_states" not in takes:
        arguments["positions"] = positions.repeat(model_config.mrope_num_dims, 1)
    if "intermediate_tensors" in takes:
        arguments["intermediate_tensors"] = _intermediate(root, vllm_config, which)
    if model_config.is_multimodal_model and "inputs_embeds" in takes:
        arguments["inputs_embeds"] = root.embed_input_ids(ids)  # type: ignore[operator]
    if "hidden_states" in takes:  # an EAGLE or MTP drafter, fed by the target
        arguments["hidden_states"] = _noise(
            which, (count, model_config.get_hidden_size()), model_config.dtype, device
        )
    _select_no_adapter(root, count)
    parallel = vllm_config.parallel_config
    across = None
    if parallel.data_parallel_size > 1:
        across = torch.full((parallel.data_parallel_size,), count, dtype=torch.int32)
    with set_forward_context(
        None,
        vllm_config,
        num_tokens=count,
        num_tokens_across_dp=across,
        slot_mapping={},
        skip_compiled=True,
    ):
        root(**arguments)


def _intermediate(
    root: Any, vllm_config: VllmConfig, which: torch.Tensor
) -> IntermediateTensors | None:
    """The tensors that the pipeline's previous rank would send: noise by token."""
    from vllm.distributed import get_pp_group

    if get_pp_group().is_first_rank:
        return None
    empty = root.make_empty_intermediate_tensors(
        batch_size=len(which),
        dtype=vllm_config.model_config.dtype,
        device=torch.device(vllm_config.device_config.device),
    )
    return IntermediateTensors(
        {
            name: _noise(which, tensor.shape, tensor.dtype, tensor.device)
            for name, tensor in empty.tensors.items()
        }
    )


def _noise(which: torch.Tensor, shape, dtype, device) -> torch.Tensor:
    """Random rows, the same on every rank and for every row of a token."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(_TOKENS), *shape[1:], generator=generator)
    return rows[which].to(device=device, dtype=dtype)


def _select_no_adapter(root: torch.nn.Module, count: int) -> None:
    """Tell LoRA layers that no row has an adapter."""
    manager = getattr(root, "lora_manager", None)
    if manager is None:
        return
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping((0,) * count, (0,) * count, is_prefill=True)
    manager.set_adapter_mapping(mapping)
