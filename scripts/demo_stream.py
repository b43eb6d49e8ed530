"""One long text through sink and through stock attention, side by side.

For several lengths: the perplexity of the last 1,024 tokens up to there, and
the most KV cache blocks that the request held on the way. Each policy runs in
a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.machine import fast_dtype

LENGTHS = (2048, 4096, 8192, 12288)
SPAN = 1024  # tokens of a perplexity
CHUNK = 1024  # tokens of an engine step
MAX_MODEL_LEN = 16384
EVENT = "DEMO_STREAM "  # starts the lines that the child means for the parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model folder or name")
    parser.add_argument("--text", type=Path, help="a text file (Python's manual)")
    parser.add_argument("--sinks", type=int, default=4, help="S (4)")
    parser.add_argument("--window", type=int, default=1020, help="W (1020)")
    parser.add_argument(
        "--trained-length", type=int, help="of the model (its max_position_embeddings)"
    )
    parser.add_argument("--dtype", default=fast_dtype(), help="fast here: %(default)s")
    parser.add_argument("--policy", choices=("sink", "stock"), help=argparse.SUPPRESS)
    return parser.parse_args()


def read_text(path: Path | None) -> str:
    if path is not None:
        return path.read_text(errors="replace")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def trained_length(model: str) -> int:
    """The model's ``max_position_embeddings``."""
    if (Path(model) / "config.json").is_file():
        config = json.loads((Path(model) / "config.json").read_text())
        found = config.get("text_config", config).get("max_position_embeddings")
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model).get_text_config()
        found = getattr(config, "max_position_embeddings", None)
    return int(found or MAX_MODEL_LEN)


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


# --- child: one engine --------------------------------------------------------


def emit(**event) -> None:
    print(EVENT + json.dumps(event), flush=True)


def run_policy(args: argparse.Namespace) -> None:
    """Stream the text through one engine and report to the parent."""
    from vllm import LLM, SamplingParams

    from vllm_sink.rotation.table_length import overrides_for

    kwargs = {}
    if args.policy == "sink":
        kwargs["attention_backend"] = "sink"
        kwargs["additional_config"] = {
            "sink": {"num_sink_tokens": args.sinks, "window_size": args.window}
        }
    llm = LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=True,
        disable_log_stats=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=CHUNK,
        # A row of the rotary table for every position.
        hf_overrides=overrides_for(args.model, MAX_MODEL_LEN),
        **kwargs,
    )
    tokens = llm.get_tokenizer()(read_text(args.text))["input_ids"][: LENGTHS[-1]]
    lengths = [length for length in LENGTHS if length <= len(tokens)]
    if not lengths:
        sys.exit(
            f"--text must have at least {LENGTHS[0]} tokens, got {len(tokens)}; "
            "give a longer file"
        )
    tokens = tokens[: lengths[-1]]

    # Two tokens of output: after its last chunk the request still holds blocks.
    params = SamplingParams(
        temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0
    )
    engine = llm.llm_engine
    engine.add_request("stream", {"prompt_token_ids": tokens}, params)
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    (request,) = scheduler.requests.values()
    usable = pool.num_gpu_blocks - 1  # less the null block
    peaks, peak, final = {}, 0, None
    start = time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                final = output
        done = min(request.num_computed_tokens, len(tokens))
        peak = max(peak, usable - pool.get_num_free_blocks())
        peaks.update({n: peak for n in lengths if n not in peaks and done >= n})
        emit(kind="progress", tokens=done, total=len(tokens), blocks=peak)
    seconds = time.monotonic() - start
    logprobs = [
        entry[token].logprob
        for entry, token in zip(final.prompt_logprobs[1:], tokens[1:], strict=True)
    ]
    rows = [
        {
            "length": n,
            # logprobs[i] is that of token i + 1
            "perplexity": perplexity(logprobs[n - 1 - SPAN : n - 1]),
            "blocks": peaks[n],
        }
        for n in lengths
    ]
    block_size = engine.vllm_config.cache_config.block_size
    emit(kind="result", rows=rows, seconds=seconds, block_size=block_size)


# --- parent: both policies and the table --------------------------------------


def run_child(policy: str, args: argparse.Namespace) -> dict:
    """Run one policy in a process; show its progress; return its result."""
    command = [sys.executable, __file__, args.model, "--policy", policy]
    command += ["--sinks", str(args.sinks), "--window", str(args.window)]
    command += ["--trained-length", str(args.trained_length), "--dtype", args.dtype]
    if args.text is not None:
        command += ["--text", str(args.text)]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        # The engine's steps and block pool are reached from this process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    start = time.monotonic()
    print(f"  {policy}: starting the engine", flush=True)
    log, result, reported = [], None, 0
    with subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        for line in child.stdout:
            if not line.startswith(EVENT):
                log.append(line.rstrip())
                continue
            event = json.loads(line[len(EVENT) :])
            if event["kind"] == "result":
                result = event
            elif event["tokens"] >= reported + 2 * CHUNK:
                reported = event["tokens"]
                print(
                    f"  {policy}: {event['tokens']:>6,} of {event['total']:,} tokens, "
                    f"{event['blocks']} KV blocks at most, "
                    f"{time.monotonic() - start:.0f} s",
                    flush=True,
                )
    if child.returncode or result is None:
        sys.exit("\n".join([*log[-30:], f"error: the {policy} engine failed"]))
    return result


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(title)
        for row in [header, *rows]:
            print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
        return
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 88).print(table)


def main() -> None:
    args = parse_args()
    if args.trained_length is None:
        args.trained_length = trained_length(args.model)
    if args.policy is not None:
        run_policy(args)
        return
    results = {policy: run_child(policy, args) for policy in ("sink", "stock")}
    sink, stock = results["sink"], results["stock"]
    rows = [
        [
            f"{a['length']:,}" + ("*" if a["length"] > args.trained_length else ""),
            f"{a['perplexity']:.2f}",
            f"{b['perplexity']:.2f}",
            str(a["blocks"]),
            str(b["blocks"]),
        ]
        for a, b in zip(sink["rows"], stock["rows"], strict=True)
    ]
    print()
    print_table(
        f"One stream: sink ({args.sinks} + {args.window} tokens) and stock attention",
        ["tokens", "ppl sink", "ppl stock", "KV blocks sink", "KV blocks stock"],
        rows,
    )
    print(
        f"ppl: perplexity of the last {SPAN:,} tokens up to there; KV blocks: the most "
        f"blocks of\n{sink['block_size']} tokens held until there, chunks of {CHUNK:,} "
        f"tokens; *: past the trained length\n"
        f"({args.trained_length:,}). Whole stream: sink {sink['seconds']:.0f} s, "
        f"stock {stock['seconds']:.0f} s."
    )


if __name__ == "__main__":
    main()
