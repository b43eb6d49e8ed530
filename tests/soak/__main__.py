"""A real server under the load of many clients, for as long as you like.

    python -m tests.soak --minutes 60 --seed 1
    python -m tests.soak --minutes 10 --seed 2 --ngram --clients 200
    python -m tests.soak --minutes 3 --seed 3 --host-cache

Each client asks one request after another from a deck of some forty kinds whose
answers were noted while nothing else ran: whole, as a stream, or hung up on. The
pool of KV blocks is small, so that requests are preempted; the prefix cache is
reset every 20 s. With ``--host-cache`` what the pool loses comes back from host
memory. With ``--faults`` further servers are started beside it and suffer.
Prints a summary as JSON and the faults as a table; the exit status is 1 if anything
that must hold did not.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import tempfile
import time
from pathlib import Path

from tests.soak.deck import Deck
from tests.soak.fault_ray import cluster, deployment
from tests.soak.fault_servers import (
    full_disk,
    moved_clock,
    read_only_disk,
    second_server,
)
from tests.soak.faults import SHUTDOWN_S, Lives
from tests.soak.model import save_tiny
from tests.soak.run import Report, soak
from tests.soak.server import Server

MAX_MODEL_LEN = 1024
FLAGS = ["--max-model-len", str(MAX_MODEL_LEN), "--block-size", "16"]
FLAGS += ["--max-num-batched-tokens", "256", "--max-num-seqs", "24"]
FLAGS += ["--num-gpu-blocks-override", "220", "--scheduling-policy", "priority"]
FLAGS += ["--shutdown-timeout", str(SHUTDOWN_S), "--additional-config"]
FLAGS += ['{"sink": {"num_sink_tokens": 4, "window_size": 124}}']
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'
# Some 650 blocks of the small model, thrice the pool: turns leave the host, too.
HOST_CACHE = json.dumps(
    {
        "kv_connector": "SinkHostCache",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"host_cache_gib": 0.005},
    }
)
LIVES = {
    "ray-worker": cluster,
    "ray-replica": deployment,
    "second": second_server,
    "clock": moved_clock,
    "full": full_disk,
    "read-only": read_only_disk,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--ngram", action="store_true", help="n-gram speculation")
    parser.add_argument(
        "--host-cache", action="store_true", help="host memory behind the pool"
    )
    parser.add_argument(
        "--faults",
        nargs="*",
        metavar="LIFE",
        help="servers beside it that suffer, one after another: "
        f"{', '.join(LIVES)}; without names all of them",
    )
    parser.add_argument("--logs", help="a folder; left out: the logs are not kept")
    parser.add_argument(
        "--model",
        help="a model folder; left out: a small random Llama with the tokenizer of "
        "VLLM_SINK_TEST_MODEL",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(args.logs or folder)
        logs.mkdir(exist_ok=True)
        model = args.model or save_tiny(
            os.environ["VLLM_SINK_TEST_MODEL"], Path(folder) / "model", MAX_MODEL_LEN
        )
        flags = [*FLAGS, *(["--speculative-config", NGRAM] if args.ngram else [])]
        flags += ["--kv-transfer-config", HOST_CACHE] if args.host_cache else []
        server = Server(model, logs / "main.log", *flags)
        report = Report(args.seed, 60 * args.minutes, args.clients, args.host_cache)
        deck = Deck(args.seed, vocab=40_000, max_model_len=MAX_MODEL_LEN)
        lives = Lives(model, flags, logs, deck.cards, server, args.seed)
        names = [] if args.faults is None else args.faults or list(LIVES)
        try:
            server.wait_ready()
            start = time.monotonic()
            beside = functools.partial(lives.lead, [LIVES[name] for name in names])
            asyncio.run(soak(server, deck, report, beside))
            server.process.terminate()
            lives.saw("SIGTERM with nothing in flight", lives.check_end(server))
            print(f"{time.monotonic() - start:.0f} s in all, solo answers included")
        except Exception as error:  # the server died, or before the load; told below
            report.failures.append(f"{type(error).__name__}: {error}")
        finally:
            server.stop()
        report.failures += lives.failures
        if report.failures:
            print(server.first_error())
        report.print()
        print(lives.table())
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
