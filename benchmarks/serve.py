"""Requests at a fixed rate: ``vllm bench serve`` against ``vllm serve``.

A server with the policy and one without, one after the other, get the same random
prompts at the same moments. At this rate the first keeps up.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import common

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


@contextmanager
def server(engine: str, model: str, dtype: str, log: Path) -> Iterator[int]:
    """A server on loopback; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(*VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", dtype, "--max-num-batched-tokens", "2048"),
        *("--max-num-seqs", "16", "--no-enable-prefix-caching"),
    ]
    command += common.flags(engine)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        while not _is_up(port):
            if process.poll() is not None:
                raise RuntimeError(f"no server:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def bench(model: str, port: int, rate: float, args) -> dict:
    """``vllm bench serve``'s own result; each run has the same prompts and times."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(*VLLM, "bench", "serve", "--backend", "openai", "--model", model),
            *("--host", "127.0.0.1", "--port", str(port), "--seed", "0"),
            *("--dataset-name", "random", "--ignore-eos"),
            *("--random-input-len", str(args.input_len), "--random-range-ratio", "0"),
            *("--random-output-len", str(args.output_len)),
            *("--num-prompts", str(args.num_prompts), "--request-rate", str(rate)),
            *("--save-result", "--save-detailed"),
            *("--result-dir", folder, "--result-filename", "out.json"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
        return json.loads((Path(folder) / "out.json").read_text())


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--request-rate", type=float, default=0.06, help="a second")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=4096)
    parser.add_argument("--output-len", type=int, default=128)
    args = parser.parse_args()
    table = common.Table("serve", args.model)
    for dtype in args.dtypes:
        table.dtype = dtype
        for engine in ("sink", "stock"):
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder) / "server.log"
                with server(engine, args.model, dtype, log) as port:
                    found = bench(args.model, port, args.request_rate, args)
            assert found["completed"] == args.num_prompts, found
            first = [1e3 * x for x in found["ttfts"]]
            each = [1e3 * sum(x) / len(x) for x in found["itls"]]
            table.add(engine, "ttft", args.input_len, first, "ms")
            table.add(engine, "tpot", args.input_len, each, "ms")
            total = [found["total_token_throughput"]]
            table.add(engine, "throughput", args.input_len, total, "tokens/s")
            table.save()


if __name__ == "__main__":
    main()
