"""Capacity: what fits into one KV pool, and what that does to throughput.

Concurrency: vLLM's block manager admits requests of a context until it refuses
one; no model runs, so contexts may be long. Throughput: ``vllm bench
throughput`` on a small pool, sink and stock one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common
from vllm_sink.rotation.table_length import overrides_for

BLOCK_SIZE = 128
CHUNK = 2048
POOL_GIB = 2
CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
# SmolLM2-135M in float32.
LAYERS, KV_HEADS, HEAD_SIZE = 30, 3, 64


def concurrency(engine: str, context: int) -> int:
    """Requests of ``context`` tokens that one pool holds at once."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.request import Request

    from vllm_sink.cache.spec import SinkSpec
    from vllm_sink.plugin import compat
    from vllm_sink.policy.config import SinkConfig

    compat.register_kv_cache_spec()
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
    )
    if engine == "sink":
        config = SinkConfig(common.NUM_SINK_TOKENS, common.WINDOW_SIZE)
        spec = SinkSpec.from_full(spec, config)
    num_blocks = POOL_GIB * 2**30 // (LAYERS * spec.page_size_bytes)
    manager = KVCacheManager(
        KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        max_model_len=context + 1,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        max_in_flight_tokens=CHUNK,
        enable_caching=False,
    )
    for admitted in range(num_blocks):
        request = Request(
            str(admitted), [1] * context, SamplingParams(max_tokens=1), None
        )
        # A chunk at a time, as the scheduler does; then one decoded token.
        for start in range(0, context, CHUNK):
            request.num_computed_tokens = start
            count = min(CHUNK, context - start)
            if manager.allocate_slots(request, count) is None:
                return admitted
        request.append_output_token_ids(1)
        request.num_computed_tokens = context
        if manager.allocate_slots(request, 1) is None:
            return admitted
    return num_blocks


def throughput(engine: str, model: str, context: int, num_prompts: int) -> dict:
    """``vllm bench throughput``'s own result."""
    blocks = (context + 512) // BLOCK_SIZE + 1  # one dense request and a bit
    max_model_len = context + 256  # vLLM wants room for one such request
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "throughput"),
            *("--model", model, "--dtype", "float32", "--enforce-eager"),
            *("--dataset-name", "random", "--random-input-len", str(context)),
            *("--random-output-len", "128", "--random-range-ratio", "0"),
            *("--num-prompts", str(num_prompts), "--output-json", str(path)),
            *("--num-gpu-blocks-override", str(blocks)),
            *("--max-num-batched-tokens", "512", "--max-num-seqs", "16"),
            *("--max-model-len", str(max_model_len), "--no-enable-prefix-caching"),
            "--hf-overrides",
            json.dumps(overrides_for(model, max_model_len)),
        ]
        command += common.flags(engine)
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
        return json.loads(path.read_text())


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--num-prompts", type=int, default=4)
    args = parser.parse_args()
    table = common.Table("capacity", args.model)
    for context in CONTEXTS:
        for engine in ("sink", "stock"):
            n = concurrency(engine, context)
            table.add(
                engine, "concurrency", context, [n], f"requests in {POOL_GIB} GiB"
            )
    table.save()
    for context in (4096,) if args.quick else (4096, 8192, 16384):
        for engine in ("sink", "stock"):
            result = throughput(engine, args.model, context, args.num_prompts)
            samples = [result["tokens_per_second"]]
            table.add(engine, "throughput", context, samples, "tokens/s")
            table.save()


if __name__ == "__main__":
    main()
