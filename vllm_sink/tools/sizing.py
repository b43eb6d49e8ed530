"""How many requests fit: ``vllm-sink size --model MODEL``.

Reads a model's configuration, allocates nothing, and prints the KV cache of
stock vLLM (dense) against the sink policy. Blocks are counted by
:class:`vllm_sink.policy.layout.RetentionPolicy`, as the block manager counts them;
layers are grouped as vLLM groups them, padding included.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

from vllm_sink.policy.config import SinkConfig
from vllm_sink.policy.grouping import RequestMemory, choose_grouping, heads_of_workers
from vllm_sink.policy.layout import RetentionPolicy, cdiv
from vllm_sink.policy.resolve import model_shape
from vllm_sink.policy.words import format_bytes
from vllm_sink.tools.cli import print_json

BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}
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


@dataclass(frozen=True)
class CacheShape:
    """What a model writes into the KV cache, for one GPU of the group.

    Args:
        num_full_layers: Layers with full attention: the policy's.
        num_sliding_layers: Layers with a window of their own, which they keep.
        sliding_window: Tokens of that window; 0 without such layers.
        num_kv_heads: KV heads of one GPU.
        head_size: Elements of one K (or V) vector.
        bytes_per_value: Bytes of one element.
    """

    num_full_layers: int
    num_sliding_layers: int
    sliding_window: int
    num_kv_heads: int
    head_size: int
    bytes_per_value: int

    @property
    def layer_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.bytes_per_value

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        layers = self.num_full_layers + self.num_sliding_layers
        return layers * self.layer_bytes_per_token

    @property
    def layers_per_group(self) -> int:
        """Layers that share a block table, as vLLM groups a hybrid model.

        The smaller kind's number of layers, or the larger's when the two are
        within half of each other; short groups are padded.
        """
        kinds = [n for n in (self.num_full_layers, self.num_sliding_layers) if n]
        return max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)

    def pool_block_bytes(self, block_size: int) -> int:
        """Bytes of one block of the pool: ``block_size`` tokens of one group."""
        return self.layers_per_group * block_size * self.layer_bytes_per_token

    def request_blocks(
        self,
        policy: RetentionPolicy | None,
        num_tokens: int,
        in_flight_tokens: int,
        block_size: int,
    ) -> int:
        """Most pool blocks that one request of ``num_tokens`` holds.

        Args:
            policy: The policy of the full-attention layers; None is dense.
            num_tokens: Length of the request, prompt and answer.
            in_flight_tokens: Its tokens scheduled and not yet settled.
            block_size: Tokens a block.
        """
        dense = cdiv(num_tokens, block_size)
        full = (
            policy.max_blocks(in_flight_tokens, num_tokens, block_size)
            if policy
            else dense
        )
        blocks = cdiv(self.num_full_layers, self.layers_per_group) * full
        if self.num_sliding_layers:
            own = RetentionPolicy(0, self.sliding_window)
            blocks += cdiv(
                self.num_sliding_layers, self.layers_per_group
            ) * own.max_blocks(in_flight_tokens, num_tokens, block_size)
        return blocks


def read_shape(
    config: Any, dtype: str = "auto", tensor_parallel_size: int = 1
) -> CacheShape:
    """The cache shape of a Hugging Face ``config``.

    Raises:
        ValueError: A kind of attention that isn't counted here, by name.
    """
    text = config.get_text_config(decoder=True)

    def get(name: str) -> Any:
        return getattr(text, name, None)

    for name, what in (
        ("kv_lora_rank", "MLA"),
        ("global_head_dim", "head sizes that differ between layers"),
        ("block_configs", "blocks that differ between layers"),
        ("layers_block_type", "state-space layers"),
        ("hybrid_override_pattern", "state-space layers"),
        ("attention_chunk_size", "chunked attention"),
    ):
        if get(name) is not None:
            raise ValueError(
                f"model must have plain attention layers, got {what} ({name}="
                f"{get(name)!r}); read vLLM's own figure in its start-up log"
            )
    for name in ("num_hidden_layers", "num_attention_heads"):
        _check_count(name, get(name))
    for name in ("num_key_value_heads", "head_dim", "hidden_size", "sliding_window"):
        if get(name):
            _check_count(name, get(name))
    num_layers = text.num_hidden_layers
    window = get("sliding_window") or None
    if get("use_sliding_window") is False:
        window = None
    layer_types = (
        get("layer_types")
        or ["sliding_attention" if window else "full_attention"] * num_layers
    )
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, (list, tuple)) or any(
        kind not in kinds for kind in layer_types
    ):
        raise ValueError(
            f"layer_types must be a list of {' and '.join(kinds)}, got "
            f"{layer_types!r}; read vLLM's own figure in its start-up log"
        )
    # Layers that reuse the cache of an earlier layer write none of their own.
    if shared := get("num_kv_shared_layers"):
        _check_count("num_kv_shared_layers", shared, below=len(layer_types))
        layer_types = layer_types[: num_layers - shared]
    num_sliding = layer_types.count("sliding_attention")
    if num_sliding and not window:
        raise ValueError(
            f"sliding_window must be a number of tokens, got {window!r} in a model "
            f"with {num_sliding} sliding_attention layers; give it in config.json"
        )
    heads = text.num_attention_heads
    head_size = get("head_dim") or (get("hidden_size") or 0) // heads
    if not head_size or not layer_types:
        raise ValueError(
            "model must have attention layers of a known head size, got "
            f"hidden_size={get('hidden_size')!r} and {len(layer_types)} layers; mend "
            "the model's config.json"
        )
    if dtype == "auto":
        dtype = str(get("dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in BYTES_PER_VALUE:
        raise ValueError(
            f"dtype must be one of {', '.join(BYTES_PER_VALUE)}, got {dtype!r}; "
            "pass --dtype"
        )
    return CacheShape(
        num_full_layers=len(layer_types) - num_sliding,
        num_sliding_layers=num_sliding,
        sliding_window=window if num_sliding and window else 0,
        # Fewer KV heads than GPUs: vLLM replicates them.
        num_kv_heads=max(
            1, (get("num_key_value_heads") or heads) // tensor_parallel_size
        ),
        head_size=head_size,
        bytes_per_value=BYTES_PER_VALUE[dtype],
    )


def _check_count(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < below:
        limit = "" if math.isinf(below) else f" and < {below}"
        raise ValueError(
            f"{name} must be an integer > 0{limit}, got {value!r}; mend the model's "
            "config.json"
        )


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
    """What one request of ``num_tokens`` takes; ``policy`` None is dense.

    ``growth_bytes`` is what one more token adds at that length, in the
    full-attention layers: beyond the budget it takes the place of an evicted one.
    """
    block_bytes = shape.pool_block_bytes(block_size)
    full_bytes = shape.num_full_layers * shape.layer_bytes_per_token
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
    heads: RequestMemory, *, memory: int, num_tokens: int, batched_tokens: int
) -> dict[str, Any]:
    """As :func:`measure`, where KV heads are of two kinds."""
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


def heads_memory(
    shape: CacheShape, config: SinkConfig, tensor_parallel_size: int, block_size: int
) -> RequestMemory:
    """What a request holds on the GPU with the most retrieval heads.

    Args:
        config: Resolved, with heads of both kinds.
    """
    heads = config.head_map
    assert heads is not None and not heads.is_uniform, heads
    if shape.num_sliding_layers:
        raise ValueError(
            "retrieval_heads must be left out for a model with layers that have "
            f"windows of their own, got {shape.num_sliding_layers} of them; leave "
            "--retrieval-heads out"
        )
    held, counts = heads_of_workers(heads, tensor_parallel_size, 0)
    head_bytes = block_size * shape.layer_bytes_per_token
    if heads.splits_layers:
        head_bytes //= shape.num_kv_heads
    return RequestMemory(
        grouping=choose_grouping(counts.values()),
        num_heads=sum(counts[held]),
        head_bytes=head_bytes,
        block_size=block_size,
        streaming=config.policy,
        retrieval=config.retrieval_policy,
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
    return table


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
    add("--dtype", default="auto", choices=["auto", *BYTES_PER_VALUE])
    add("--tensor-parallel-size", type=_positive, default=1)
    add("--max-num-batched-tokens", type=_positive, default=2048)


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

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model)
    shape = read_shape(config, args.dtype, args.tensor_parallel_size)
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
    heads = settings.resolved(model_shape(config)).head_map
    if heads is not None and heads.num_retrieval_heads:
        kept = settings.retrieval_policy
        kind = "all" if kept is None else f"{kept.num_sink_tokens}+{kept.window_size}"
        header += f", {heads.num_retrieval_heads} of {heads.num_heads} heads {kind}"
        if heads.is_uniform:
            sink = measure(shape, kept, **request, block_size=args.block_size)
        else:
            resolved = settings.resolved(model_shape(config))
            memory = heads_memory(
                shape, resolved, args.tensor_parallel_size, args.block_size
            )
            sink = measure_heads(memory, **request)
    if args.json:
        print_json(
            {
                "model": args.model,
                "policy": asdict(policy),
                "cache": asdict(shape),
                "tensor_parallel_size": args.tensor_parallel_size,
                **request,
                "block_size": args.block_size,
                "retrieval_heads": heads and heads.num_retrieval_heads,
                "bytes_per_token": shape.bytes_per_token,
                "dense": dense,
                "sink": sink,
            }
        )
        return 0
    layers = f"{shape.num_full_layers} full-attention layers"
    if shape.num_sliding_layers:
        layers += (
            f", {shape.num_sliding_layers} with their own window of "
            f"{shape.sliding_window:,}"
        )
    title = (
        f"{os.path.basename(args.model.rstrip('/'))}: {layers}; on each of "
        f"{args.tensor_parallel_size} GPU(s) {shape.num_kv_heads} KV heads of "
        f"{shape.head_size}, {shape.bytes_per_value} bytes a value"
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
