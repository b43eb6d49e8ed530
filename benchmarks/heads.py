"""Heads of two policies: decode, prefill, capacity; beside stock and the plain policy.

Half of the KV heads, spread evenly, keep everything. The engines take turns step by
step, as in ``stream``. ``line`` is what half of the bytes would cost if time were
bytes: the mean of stock and the plain policy at a context, from medians.
"""

from __future__ import annotations

from benchmarks import common, stream

CONTEXTS = (128, 1000, 7000)
PREFILL = 8000
BLOCK_SIZE, POOL_GIB = 128, 2
SHARES = {"none": 0, "quarter": 23, "half": 45}
# SmolLM2-135M in float32.
LAYERS, KV_HEADS, HEAD_SIZE = 30, 3, 64


def spread(count: int) -> list[list[int]]:
    """``count`` retrieval heads, evenly over the layers and heads."""
    total = LAYERS * KV_HEADS
    flags = [(i + 1) * count // total - i * count // total for i in range(total)]
    return [flags[i : i + KV_HEADS] for i in range(0, total, KV_HEADS)]


def requests_that_fit(name: str, context: int) -> tuple[int, float]:
    """Requests of ``context`` tokens in a pool: the block manager's, calculated."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.request import Request

    from vllm_sink.cache.spec import RetrievalSpec, SinkSpec
    from vllm_sink.plugin import compat
    from vllm_sink.policy.config import SinkConfig
    from vllm_sink.policy.grouping import RequestMemory, choose_grouping

    compat.register_kv_cache_spec()
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=1,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
    )
    config = SinkConfig(common.NUM_SINK_TOKENS, common.WINDOW_SIZE)
    total = LAYERS * KV_HEADS
    count = SHARES.get(name, total)
    memory = RequestMemory(
        choose_grouping([(count, total - count)]),
        total,
        full.page_size_bytes,
        BLOCK_SIZE,
        config.policy,
    )
    specs = [RetrievalSpec.from_full(full)] * memory.grouping.num_retrieval
    specs += [SinkSpec.from_full(full, config)] * memory.grouping.num_streaming
    num_blocks = POOL_GIB * 2**30 // memory.pool_block_bytes
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks, [], groups),
        max_model_len=context + 1,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        max_in_flight_tokens=stream.CHUNK,
        enable_caching=False,
    )
    admitted = 0
    while True:
        request = Request(
            str(admitted), [1] * context, SamplingParams(max_tokens=1), None
        )
        # A chunk at a time, as the scheduler does; then one decoded token.
        for start in range(0, context + 1, stream.CHUNK):
            request.num_computed_tokens = start
            if start + stream.CHUNK > context:
                request.append_output_token_ids(1)
            chunk = min(stream.CHUNK, context + 1 - start)
            if manager.allocate_slots(request, chunk) is None:
                return admitted, (num_blocks - 1) / memory.blocks(context + 1)
        admitted += 1


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="tokens a round")
    args = parser.parse_args()
    table = common.Table("heads", args.model)
    for name in ("dense", "half", "quarter", "none"):
        for context in (8192, 32768):
            counted, calculated = requests_that_fit(name, context)
            table.add(name, "requests", context, [counted], "requests")
            table.add(name, "calculated", context, [calculated], "requests")
    table.save()
    for dtype in args.dtypes:
        table.dtype = dtype
        measure_speed(args, dtype, table)
    table.save()


def measure_speed(args, dtype: str, table) -> None:
    """Prefill and decode of stock, half of the heads and none, step by step in turn."""
    tokens = common.prose(args.model, PREFILL + 2000)
    half = {
        "num_sink_tokens": common.NUM_SINK_TOKENS,
        "window_size": common.WINDOW_SIZE,
        "retrieval_heads": spread(SHARES["half"]),
    }
    options = {"attention_backend": "sink", "additional_config": {"sink": half}}
    max_model_len = PREFILL + 64
    engines = [
        (common.Engine("stock", args.model, max_model_len, dtype), PREFILL),
        (common.Engine("half", args.model, max_model_len, dtype, **options), PREFILL),
        (common.Engine("sink", args.model, max_model_len, dtype), PREFILL),
    ]
    for engine, _ in engines:  # warm-up: compilation, allocation
        engine.add(tokens[-1500:], 4)
        while engine.is_busy():
            engine.step()
    stream.prefill(engines, tokens, table)
    stream.decode(
        engines, tokens, CONTEXTS, table, rounds=args.rounds, steps=args.steps
    )
    values = {
        (row["engine"], row["context"]): float(str(row["value"]))
        for row in table.rows
        if row["metric"] == "tpot" and row["dtype"] == dtype
    }
    for context in CONTEXTS:
        line = (values["stock", context] + values["sink", context]) / 2
        table.add("line", "tpot", context, [line], "ms")
    for engine, _ in engines:
        engine.close()


if __name__ == "__main__":
    main()
