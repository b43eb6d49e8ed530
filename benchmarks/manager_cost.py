"""The scheduler's time for a decoded token, short requests against endless ones.

    python -m benchmarks.manager_cost [--tokens 1000 1000000] [--repeats 20]

``allocate_slots`` (eviction of the gap included) of one more token, for a
request of each context length, in CPU time of the thread. The lengths take turns
within a round, so that whatever else the machine does hits both; medians with 20th
and 80th percentile. Requests start afresh before they have grown by 500 tokens.
Then the search for a prefix hit on a prompt that misses everywhere past its
sinks (the worst case), which must be linear in the prompt.

Writes benchmarks/results/manager_cost.csv.
"""

import argparse
import csv
import gc
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import vllm
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_sink.cache import metrics
from vllm_sink.cache.spec import SinkSpec
from vllm_sink.plugin import compat

BLOCK_SIZE = 16
CHUNK = 8192  # prefill, tokens a step
TOKENS_A_ROUND = 16  # decoded in one timing: one block is freed and one taken
ROUNDS = 30  # before the requests start afresh
RESULTS = Path(__file__).parent / "results" / "manager_cost.csv"


def make_manager(num_sinks: int, window: int, max_model_len: int) -> KVCacheManager:
    compat.register_kv_cache_spec()
    spec = SinkSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=1,
        head_size=16,
        dtype=torch.float32,
        sliding_window=window,
        num_sink_tokens=num_sinks,
    )
    return KVCacheManager(
        KVCacheConfig(
            num_blocks=2048,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        max_model_len=max_model_len,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        max_in_flight_tokens=CHUNK,
    )


def make_request(name: str, num_tokens: int, first: int = 0) -> Request:
    return Request(
        name,
        [first] * 16 + [1] * (num_tokens - 16),
        SamplingParams(max_tokens=1 << 20),
        None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def prefill(manager: KVCacheManager, request: Request) -> None:
    while (start := request.num_computed_tokens) < request.num_tokens:
        count = min(CHUNK, request.num_tokens - start)
        assert manager.allocate_slots(request, count) is not None
        request.num_computed_tokens = start + count


def decode(manager: KVCacheManager, request: Request) -> float:
    """Nanoseconds a token in ``allocate_slots``, over TOKENS_A_ROUND tokens."""
    spent = 0
    for _ in range(TOKENS_A_ROUND):
        request.append_output_token_ids(1)  # hashes: not the manager's cost
        start = time.thread_time_ns()
        allocated = manager.allocate_slots(request, 1)
        spent += time.thread_time_ns() - start
        assert allocated is not None
        request.num_computed_tokens += 1
    return spent / TOKENS_A_ROUND


def search(manager: KVCacheManager, request: Request) -> float:
    """Nanoseconds of one search for the longest hit."""
    start = time.thread_time_ns()
    _, hit, _ = manager.get_computed_blocks(request)
    spent = time.thread_time_ns() - start
    assert hit == BLOCK_SIZE, "the sinks' block is all that hits"
    return spent


def summary(samples: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples, n=10)
    return {"median": statistics.median(samples), "p20": cuts[1], "p80": cuts[7]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    metrics.register_collector()  # as served: with the counters of /metrics
    init_none_hash(sha256)
    short = min(arguments.tokens)
    # S + W = 516: both lengths are past the window and evict as they go.
    manager = make_manager(4, 512, 2 * max(arguments.tokens))
    samples: dict[int, list[float]] = {n: [] for n in arguments.tokens}
    ratios: dict[int, list[float]] = {n: [] for n in arguments.tokens}
    for repeat in range(arguments.repeats):
        requests = {n: make_request(f"{n}-{repeat}", n, n) for n in samples}
        for request in requests.values():
            prefill(manager, request)
        gc.collect()
        gc.disable()
        for index in range(ROUNDS):
            spent = {n: decode(manager, request) for n, request in requests.items()}
            if index >= 5:  # warm-up
                for n, nanoseconds in spent.items():
                    samples[n].append(nanoseconds)
                    ratios[n].append(nanoseconds / spent[short])
        gc.enable()
        for request in requests.values():
            manager.free(request)
        assert manager.reset_prefix_cache()
    rows = [
        {"what": "allocate_slots, ns a decoded token", "tokens": n, **summary(times)}
        for n, times in samples.items()
    ]
    rows += [
        {"what": f"ratio to {short} tokens, paired", "tokens": n, **summary(values)}
        for n, values in ratios.items()
        if n != short
    ]

    # Another prompt with known sinks whose later blocks were never computed.
    for n in [10_000, 100_000, 1_000_000]:
        assert manager.reset_prefix_cache()
        known = make_request(f"known{n}", BLOCK_SIZE + 1)
        prefill(manager, known)
        manager.free(known)
        missing = make_request(f"missing{n}", n)
        missing_times = [search(manager, missing) / n for _ in range(21)]
        rows.append(
            {"what": "prefix search, ns a prompt token", "tokens": n}
            | summary(missing_times)
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    versions = {
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
        "python": platform.python_version(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "commit": commit,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*rows[0], *versions], lineterminator="\n", extrasaction="raise"
        )
        writer.writeheader()
        for row in rows:
            for key in ("median", "p20", "p80"):
                row[key] = round(row[key], 3)
            writer.writerow({**row, **versions})
            print(row)


if __name__ == "__main__":
    main()
