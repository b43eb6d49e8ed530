"""One long text through sink and through stock attention, side by side.

For several lengths: the perplexity of the last 1,024 tokens up to there, and
the most KV cache blocks that the request held on the way. Each policy runs in
a process of its own. What is timed begins after the engine has served a text
that is longer than S + W: no start and no compilation is in it.
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

from benchmarks.machine import fast_dtype
from scripts.demo_chat import loop_lines

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

    started = time.monotonic()
    # Other tokens than the stream's: it must find nothing in the prefix cache. Past
    # S + W, in two chunks and a decoded token: all that the stream does.
    warm = tokens[::-1][: args.sinks + args.window + CHUNK // 2]
    llm.generate(
        {"prompt_token_ids": warm},
        SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0),
        use_tqdm=False,
    )
    emit(kind="warm", tokens=len(warm), seconds=time.monotonic() - started)

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
    command = [sys.executable, "-m", "scripts.demo_stream", args.model]
    command += ["--policy", policy]
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
            elif event["kind"] == "warm":
                print(
                    f"  {policy}: engine and loops ready after "
                    f"{time.monotonic() - start:.0f} s, a warm-up of "
                    f"{event['tokens']:,} tokens\n  {' ' * len(policy)}  among them "
                    f"({event['seconds']:.1f} s); the stream's time starts now",
                    flush=True,
                )
                for told in loop_lines("\n".join(log)):
                    print(f"  {' ' * len(policy)}  {told}", flush=True)
                start = time.monotonic()
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


def report(args: argparse.Namespace, sink: dict, stock: dict) -> list[str]:
    """The table and what to remember of it, in lines of at most 80 characters."""
    trained = args.trained_length
    pairs = list(zip(sink["rows"], stock["rows"], strict=True))
    lines = [
        f"One stream: sink ({args.sinks} + {args.window} tokens) and stock attention",
        f"{'tokens':>9}  {'perplexity':^19}  {'KV blocks held':^17}",
        f"{'':9}  {'sink':>9} {'stock':>9}  {'sink':>8} {'stock':>8}",
    ]
    for a, b in pairs:
        mark = "*" if a["length"] > trained else " "
        lines.append(
            f"{a['length']:>8,}{mark}  {a['perplexity']:>9.2f} {b['perplexity']:>9.2f}"
            f"  {a['blocks']:>8} {b['blocks']:>8}"
        )
    lines += [
        f"* past the trained length of {trained:,} tokens",
        f"Perplexity of the last {SPAN:,} tokens up to there; blocks of "
        f"{sink['block_size']} tokens, the most",
        f"until there, in chunks of {CHUNK:,} tokens.",
        "",
        "To remember:",
    ]
    a, b = pairs[-1]
    lines.append(
        f"  memory      {a['blocks']} KV blocks at {a['length']:,} tokens, stock "
        f"{b['blocks']}; it stops growing"
    )
    if a["length"] > trained:
        lines.append(
            f"  quality     perplexity {a['perplexity']:.1f} past the trained length, "
            f"stock {b['perplexity']:.1f}"
        )
    else:
        lines.append(
            f"  quality     perplexity {a['perplexity']:.1f}, stock "
            f"{b['perplexity']:.1f} (within the trained length)"
        )
    lines.append(
        f"  time        {sink['seconds']:.0f} s for the stream, stock "
        f"{stock['seconds']:.0f} s, neither with a start in it"
    )
    return [line.rstrip() for line in lines]


def main() -> None:
    args = parse_args()
    if args.trained_length is None:
        args.trained_length = trained_length(args.model)
    if args.policy is not None:
        run_policy(args)
        return
    results = {policy: run_child(policy, args) for policy in ("sink", "stock")}
    print()
    print("\n".join(report(args, results["sink"], results["stock"])))


if __name__ == "__main__":
    main()
