"""Full attention and the policy in vLLM's engine on a GPU: a decode step, and the pool.

    python -m benchmarks.gpu_engine                  # 16 requests of 16,384 tokens

The model has the shape of Llama-3.1-8B and random weights, which are made on the GPU:
nothing is downloaded. Each variant is served by a process of its own, one after
another (forked once vLLM is imported), with the same flags but for the backend. A
batch of prompts is prefilled; a step is what each further token of all of them takes,
prompts served from the prefix cache: (time of ``--steps`` + 1 tokens - time of 1) /
``--steps``, the median of ``--repeats``. The pool's figure is vLLM's own: how many
requests of ``--max-len`` tokens fit at once. Without torch.compile, with CUDA graphs
of decode.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from benchmarks.machine import write_gpu_rows

LAYERS, KV_HEADS = 32, 8
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
POLICY = {"num_sink_tokens": 4, "window_size": 4092}
QUARTER = [[1, 1] + [0] * (KV_HEADS - 2)] * LAYERS
VARIANTS: dict[str, dict[str, Any] | None] = {
    "full attention": None,
    "sink": POLICY,
    "sink, a quarter of the heads keep everything": POLICY
    | {"retrieval_heads": QUARTER},
}


def settings_of(variant: str) -> dict[str, Any]:
    policy = VARIANTS[variant]
    if policy is None:
        return {}  # vLLM's own choice
    return {"attention_backend": "sink", "additional_config": {"sink": policy}}


def measure(variant: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process.

    Returns: a row of the CSV without the machine.
    """
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    from tests.helpers.engine import core, model_runner

    llm = LLM(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=args.max_len,
        max_num_seqs=args.requests,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=True,
        disable_log_stats=True,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [args.requests],
        },
        **settings_of(variant),
    )
    scheduler = core(llm).scheduler
    concurrency = get_max_concurrency_for_kv_cache_config(
        llm.llm_engine.vllm_config, scheduler.kv_cache_config
    )
    generator = torch.Generator().manual_seed(0)
    shape = args.requests, args.tokens
    tokens = torch.randint(1, MODEL["vocab_size"], shape, generator=generator)
    prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]

    def seconds(num_tokens: int) -> float:
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == num_tokens for o in outputs)
        return time.perf_counter() - start

    prefill = seconds(1)
    seconds(8)  # what is compiled at the first use
    steps = [
        (seconds(args.steps + 1) - seconds(1)) / args.steps for _ in range(args.repeats)
    ]
    backend = type(model_runner(llm)).__module__.split(".")[-2]
    return {
        "variant": variant,
        "requests": args.requests,
        "prompt_tokens": args.tokens,
        "step_ms": round(1e3 * statistics.median(steps), 3),
        "prefill_s": round(prefill, 2),
        "max_model_len": args.max_len,
        "requests_in_pool": round(concurrency, 2),
        "runner": "V2" if backend == "gpu" else "V1",
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-len", type=int, default=131072)
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=[*VARIANTS])
    parser.add_argument("--out", type=Path, help="the CSV's path")
    return parser.parse_args(argv)


def serve(variant: str, folder: str, args: argparse.Namespace, results: Queue) -> None:
    results.put(measure(variant, folder, args))


def main() -> int:
    args = parse()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # to look inside
    import vllm.entrypoints.llm  # noqa: F401  does not touch the GPU: forks may

    context = multiprocessing.get_context("fork")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        for variant in args.variant:
            results: Queue = context.Queue()
            process = context.Process(
                target=serve, args=(variant, folder, args, results)
            )
            process.start()
            process.join()
            if process.exitcode:
                print(f"{variant}: exit {process.exitcode}", file=sys.stderr)
                continue
            rows.append(results.get())
            print(rows[-1], flush=True)
    if not rows:
        return 1
    write_gpu_rows(rows, "gpu_engine", args.out)
    return int(len(rows) < len(args.variant))


if __name__ == "__main__":
    sys.exit(main())
