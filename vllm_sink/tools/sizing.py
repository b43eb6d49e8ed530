"""The number of requests that fit: ``vllm-sink size --model MODEL``.

Reads a model's configuration, allocates nothing, and prints the KV cache of
stock vLLM (dense) against the sink policy. Blocks are counted by
:class:`vllm_sink.policy.layout.RetentionPolicy`, as the block manager counts them;
layers are grouped as vLLM groups them, padding included
(:mod:`vllm_sink.tools.cache_shape`).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import asdict
from typing import Any

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.draft_heads import DraftHeads
from vllm_sink.policy.grouping import RequestMemory, heads_of_workers
from vllm_sink.policy.head_map import ModelShape
from vllm_sink.policy.layout import RetentionPolicy
from vllm_sink.policy.slot_workers import is_divided, slots_of_workers
from vllm_sink.policy.slots import (
    LayersBeside,
    SlotMemory,
    choose_slots,
    has_layers_beside,
    slots_of,
)
from vllm_sink.settings.resolve import resolved
from vllm_sink.start.log_lines import format_bytes
from vllm_sink.tools.cache_shape import CacheShape
from vllm_sink.tools.cli import print_json
from vllm_sink.tools.drafter import read_drafter
from vllm_sink.tools.model_layers import (
    BYTES_PER_VALUE,
    model_shape,
    read_config,
    read_shape,
)

MEMORY_UNITS = {
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
# With async scheduling, vLLM's default, one step runs while one is scheduled.
CONCURRENT_BATCHES = 2


def parse_memory(text: str) -> int:
    """Bytes in ``16GiB``, ``80GB``, ``512 MiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in MEMORY_UNITS:
        raise argparse.ArgumentTypeError(
            f"memory must be a number and one of {', '.join(MEMORY_UNITS)}, got "
            f"{text!r}; write for example 16GiB"
        )
    return int(float(match[1]) * MEMORY_UNITS[match[2].upper()])


def measure(
    shape: CacheShape,
    policy: RetentionPolicy | None,
    *,
    memory: int,
    num_tokens: int,
    batched_tokens: int,
    block_size: int,
) -> dict[str, Any]:
    """The memory of one request of ``num_tokens``; ``policy`` None is dense.

    ``growth_bytes`` is what one more token adds at that length, in the
    full-attention layers: beyond the budget it takes the place of an evicted one.
    """
    block_bytes = shape.pool_block_bytes(block_size)
    full_bytes = shape.full_bytes_per_token
    past = policy is not None and num_tokens > policy.budget
    result: dict[str, Any] = {"growth_bytes": 0 if past else full_bytes}
    for name, in_flight in (
        ("decoding", 1),
        ("prefilling", CONCURRENT_BATCHES * batched_tokens),
    ):
        blocks = shape.request_blocks(policy, num_tokens, in_flight, block_size)
        result[name] = {
            "blocks": blocks,
            "bytes": blocks * block_bytes,
            "requests": memory // block_bytes / blocks,
        }
    return result


def measure_heads(
    heads: RequestMemory | SlotMemory,
    *,
    memory: int,
    num_tokens: int,
    batched_tokens: int,
) -> dict[str, Any]:
    """The memory of one request where KV heads are of two kinds."""
    streams = heads.retrieval is None or num_tokens <= heads.retrieval.budget
    growing = heads.grouping.num_retrieval if streams else 0
    if num_tokens <= heads.streaming.budget:
        growing += heads.grouping.num_streaming
    growth = growing * heads.pool_block_bytes // heads.block_size
    result: dict[str, Any] = {"growth_bytes": growth}
    for name, in_flight in (
        ("decoding", 1),
        ("prefilling", CONCURRENT_BATCHES * batched_tokens),
    ):
        blocks = heads.blocks(num_tokens, in_flight)
        result[name] = {
            "blocks": blocks,
            "bytes": blocks * heads.pool_block_bytes,
            "requests": memory // heads.pool_block_bytes / blocks,
        }
    return result


def check_ranks(num_ranks: int, shape: ModelShape) -> None:
    """Refuse a number of GPUs between which vLLM can't divide a layer's heads.

    Raises:
        ValueError: Names the heads and a number that divides them.
    """
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    if heads % num_ranks or (kv_heads % num_ranks and num_ranks % kv_heads):
        most = max(n for n in range(1, num_ranks) if not kv_heads % n)
        raise ValueError(
            f"tensor_parallel_size must divide the {heads} query heads of a layer, and "
            f"its {kv_heads} KV heads or be a multiple of them, got {num_ranks}; pass "
            f"--tensor-parallel-size {most}"
        )


def heads_memory(
    shape: CacheShape,
    config: SinkConfig,
    tensor_parallel_size: int,
    block_size: int,
    draft: DraftHeads | None = None,
) -> RequestMemory:
    """The memory of a request on the GPU with the most retrieval heads.

    Args:
        shape: Of the model alone.
        config: Resolved, with heads of both kinds.
        draft: The heads of a drafter, if it has any.
    """
    heads = config.head_map
    assert heads is not None and not heads.is_uniform, heads
    (kind,) = shape.kinds
    workers = heads_of_workers(heads, tensor_parallel_size, draft=draft)
    first = next(iter(workers.counts.values()))
    head_bytes = block_size * shape.layer_bytes(kind)
    if heads.splits_layers:
        head_bytes //= kind.num_kv_heads
    return RequestMemory(
        grouping=workers.grouping,
        num_heads=sum(first),
        head_bytes=head_bytes,
        block_size=block_size,
        streaming=config.policy,
        retrieval=config.retrieval_policy,
    )


def slot_memory(
    shape: CacheShape,
    config: SinkConfig,
    tensor_parallel_size: int,
    block_size: int,
    draft: DraftHeads | None = None,
) -> SlotMemory:
    """As :func:`heads_memory`, where other layers share the pool.

    Args:
        block_size: As given; states make it larger.
    """
    heads = config.head_map
    assert heads is not None and not heads.is_uniform, heads
    governed = [kind for kind in shape.kinds if kind.is_governed]
    if len(governed) != 1:
        raise ValueError(
            "retrieval_heads must be left out for a model whose layers with full "
            f"attention differ, got {describe(shape)}; leave --retrieval-heads out"
        )
    (kind,) = governed
    block_size = shape.attention_block_size(block_size)
    page = shape.page_bytes(block_size)
    unit = shape.layer_bytes(kind)
    divided = is_divided(heads, draft=draft)
    if divided:
        unit //= kind.num_kv_heads
    beside = tuple(
        LayersBeside(
            own.num_layers,
            0 if own.state_bytes else shape.tokens_per_block(own, block_size),
            own.window or None,
            num_states=own.num_states,
            num_checkpoints=own.num_checkpoints,
            kept_bytes=own.num_states * own.state_bytes or shape.layer_bytes(own),
        )
        for own in shape.kinds
        if not own.is_governed
    )
    whole_block = shape.tokens_per_block(kind, block_size)
    slots = [(1, whole_block)]
    if divided:
        slots = list(slots_of(page, unit, block_size))
    workers = slots_of_workers(heads, tensor_parallel_size, draft=draft)
    grouping = choose_slots(
        workers.values(),
        beside,
        config.policy,
        config.retrieval_policy,
        slots=slots,
        is_divided=divided,
    )
    return SlotMemory(
        grouping=grouping,
        page_bytes=page,
        unit_bytes=unit,
        counts=max(heads.counts for heads in workers.values()),
        streaming=config.policy,
        retrieval=config.retrieval_policy,
        beside=beside,
        whole_layers=kind.num_layers + (draft.num_layers if draft else 0),
        whole_block=whole_block,
    )


def rows(
    shape: CacheShape,
    both: tuple[dict[str, Any], dict[str, Any]],
    memory: int,
    num_tokens: int,
) -> list[tuple[str, str, str]]:
    """(what, dense, sink) for every line of the table.

    Args:
        both: Dense and sink, from :func:`measure`.
    """
    written = format_bytes(shape.bytes_per_token)
    growth = [format_bytes(kind["growth_bytes"]) for kind in both]
    table = [
        ("KV bytes written per token", written, written),
        ("growth per token, full-attention layers", growth[0], growth[1]),
    ]
    for name, words in (("decoding",) * 2, ("prefilling", "prefilling, at most")):
        size = [
            f"{kind[name]['blocks']:,} blocks, {format_bytes(kind[name]['bytes'])}"
            for kind in both
        ]
        fit = [f"{kind[name]['requests']:,.1f}" for kind in both]
        what = f"one request of {num_tokens:,} tokens, {words}"
        table.append((what, size[0], size[1]))
        what = f"requests in {format_bytes(memory)}, all {words}"
        table.append((what, fit[0], fit[1]))
    if kept := both[1].get("kept_bytes"):
        ratio = both[1]["decoding"]["bytes"] / kept
        words = f"{both[1]['blocks_of']} tokens, {ratio:.2f} times what is kept"
        table.append(("blocks of heads, decoding", "", words))
    return table


def describe(shape: CacheShape) -> str:
    """The layers in words."""
    told = []
    for kind in shape.kinds:
        if kind.state_bytes:
            told.append(f"{kind.num_layers} layers with states")
            continue
        own = f" with their own window of {kind.window:,}" if kind.window else ""
        told.append(
            f"{kind.num_layers} {'' if own else 'full-attention '}layers{own}, "
            f"{kind.num_kv_heads} KV heads of {kind.head_size}"
        )
    return "; ".join(told)


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-sink size``."""
    parser.description = (
        "The KV cache of one request and how many requests fit, dense and under the "
        "policy.\nReads the model's configuration alone."
    )
    parser.epilog = (
        "example: vllm-sink size --model MODEL --memory 40GiB --max-model-len 131072"
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, config.json, or name on the Hub")
    add("--memory", type=parse_memory, default="16GiB", help="one GPU's KV cache")
    add("--max-model-len", type=_positive, help="default: the trained length")
    add("--num-sink-tokens", type=int, default=SinkConfig.num_sink_tokens)
    add("--window-size", type=int, default=SinkConfig.window_size)
    add("--retrieval-heads", metavar="FILE", help="pattern of heads that keep more")
    add("--retrieval-fraction", type=float, help="how many of them; 0 to 1")
    add("--retrieval-window-size", type=int, help="their window; default: everything")
    add("--block-size", type=_positive, default=16, help="16 on GPUs, 128 on CPUs")
    dtypes = [name for name in BYTES_PER_VALUE if name != "fp8"]
    add("--dtype", default="auto", choices=["auto", *dtypes])
    add("--kv-cache-dtype", default="auto", choices=["auto", *BYTES_PER_VALUE])
    add("--tensor-parallel-size", type=_positive, default=1)
    add("--max-num-batched-tokens", type=_positive, default=2048)
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="layers with states hold one more for it",
    )
    add("--speculative-config", metavar="JSON", help="as vLLM's: counts the drafter")


def run(args: argparse.Namespace) -> int:
    """Print the table, or the numbers."""
    settings = SinkConfig(
        args.num_sink_tokens,
        args.window_size,
        retrieval_heads=args.retrieval_heads,
        retrieval_fraction=args.retrieval_fraction,
        retrieval_window_size=args.retrieval_window_size,
    )
    policy = settings.policy

    config = read_config(args.model)
    shape = read_shape(
        config,
        args.dtype,
        args.tensor_parallel_size,
        args.kv_cache_dtype,
        caches_prefixes=args.enable_prefix_caching,
    )
    drafter, own = None, shape
    if args.speculative_config is not None:
        ranks = args.tensor_parallel_size
        given = args.speculative_config
        drafter = read_drafter(given, config, shape, args.dtype, ranks)
        own = drafter.with_states(shape)
        shape = drafter.with_layers(own)
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    num_tokens = args.max_model_len or trained
    if not num_tokens:
        raise ValueError(
            f"max_model_len must be at least 1, got {num_tokens} in the model's "
            "configuration; pass --max-model-len"
        )
    request = {
        "memory": args.memory,
        "num_tokens": num_tokens,
        "batched_tokens": args.max_num_batched_tokens,
    }
    dense = measure(shape, None, **request, block_size=args.block_size)
    sink = measure(shape, policy, **request, block_size=args.block_size)
    header = f"sink {policy.num_sink_tokens}+{policy.window_size}"
    if settings.has_retrieval:
        of_model = model_shape(config, repr(args.model))
        check_ranks(args.tensor_parallel_size, of_model)
        # As an engine clips them: equal policies are one.
        settings = resolved(settings, of_model).clipped(num_tokens)
    heads = settings.head_map
    if heads is not None and heads.num_retrieval_heads:
        kept = settings.retrieval_policy
        kind = "all" if kept is None else f"{kept.num_sink_tokens}+{kept.window_size}"
        header += f", {heads.num_retrieval_heads} of {heads.num_heads} heads {kind}"
        if heads.is_uniform:
            sink = measure(shape, kept, **request, block_size=args.block_size)
        else:
            sizes = own, settings, args.tensor_parallel_size, args.block_size
            draft = None
            if drafter is not None:
                draft = drafter.heads(own, args.tensor_parallel_size)
            if has_layers_beside(shape.has_states, heads):
                slots = slot_memory(*sizes, draft)
                sink = measure_heads(slots, **request)
                sink["blocks_of"] = slots.block_size
                sink["kept_bytes"] = slots.kept_bytes(num_tokens)
            else:
                sink = measure_heads(heads_memory(*sizes, draft), **request)
    if args.json:
        print_json(
            {
                "model": args.model,
                "policy": asdict(policy),
                "cache": asdict(shape),
                "tensor_parallel_size": args.tensor_parallel_size,
                **request,
                "block_size": args.block_size,
                "enable_prefix_caching": args.enable_prefix_caching,
                "retrieval_heads": heads and heads.num_retrieval_heads,
                "drafter": drafter and asdict(drafter),
                "bytes_per_token": shape.bytes_per_token,
                "dense": dense,
                "sink": sink,
            }
        )
        return 0
    drafts = f"{drafter.words}; " if drafter else ""
    title = (
        f"{os.path.basename(args.model.rstrip('/'))}, on each of "
        f"{args.tensor_parallel_size} GPU(s): {describe(own)}; "
        f"{drafts}{shape.bytes_per_value} byte(s) a value"
    )
    lines = rows(shape, (dense, sink), args.memory, num_tokens)
    print_table(title, ("", "dense", header), lines)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return int(text)


def print_table(
    title: str, header: tuple[str, str, str], lines: list[tuple[str, str, str]]
) -> None:
    """A rich table on a terminal, tab-separated lines in a pipe."""
    if not sys.stdout.isatty():
        for line in ((title,), header, *lines):
            print(*line, sep="\t")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
