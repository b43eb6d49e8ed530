"""Parts that every benchmark uses: engines in this process, timing, the CSV.

Timed engines run in the benchmark's own process, sink and stock side by side,
and take turns step by step: whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import cpu_flags, machine

# Before vLLM is imported: no second process, no busy waiting between ops.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUM_SINK_TOKENS, WINDOW_SIZE = 4, 1024
POLICY = {"sink": {"num_sink_tokens": NUM_SINK_TOKENS, "window_size": WINDOW_SIZE}}
# Of the CSVs: what was measured, how, and where.
MEASURED = ("benchmark", "engine", "metric", "context", "value", "p20", "p80")
MEASURED += ("unit", "n")
SETTINGS = ("num_sink_tokens", "window_size", "model", "dtype")
WHERE = (
    "machine",
    "cpu_flags",
    "cores",
    "threads",
    "vllm",
    "torch",
    "commit",
    "date",
    "command",
)
FIELDS = MEASURED + SETTINGS + WHERE


@dataclass(frozen=True)
class Measurement:
    """One row's numbers: the median, its spread and how many were taken."""

    value: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: list[float]) -> Measurement:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            len(ordered),
        )


class Table:
    """Rows of one benchmark; every row carries where it was measured.

    Args:
        dtype: Of the model and its cache in the rows that follow; may be set anew.
        suffix: Of the file's name, for another machine's rows.
    """

    def __init__(
        self, benchmark: str, model: str, dtype: str = "float32", suffix: str = ""
    ) -> None:
        self.dtype = dtype
        self.benchmark = benchmark
        name = f"{benchmark}_{suffix}" if suffix else benchmark
        self.path = RESULTS / f"{name}.csv"
        self.rows: list[dict[str, object]] = []
        self.common = {
            "benchmark": benchmark,
            "num_sink_tokens": NUM_SINK_TOKENS,
            "window_size": WINDOW_SIZE,
            "model": Path(model).name,
            "machine": machine(),
            "cpu_flags": cpu_flags(),
            "threads": os.environ["OMP_NUM_THREADS"],
            "cores": len(os.sched_getaffinity(0)),
            "vllm": importlib.metadata.version("vllm"),
            "torch": importlib.metadata.version("torch"),
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "command": command(),
        }

    def add(
        self,
        engine: str,
        metric: str,
        context: int,
        samples: list[float],
        unit: str,
    ) -> Measurement:
        """Add the median of the samples, say it, and return it."""
        m = Measurement.of(samples)
        self.rows.append(
            {
                **self.common,
                "dtype": self.dtype,
                "engine": engine,
                "metric": metric,
                "context": context,
                "value": f"{m.value:.5g}",
                "p20": f"{m.p20:.5g}",
                "p80": f"{m.p80:.5g}",
                "unit": unit,
                "n": m.n,
            }
        )
        print(
            f"{self.benchmark:10} {engine:12} {metric:12} {context:>7,} "
            f"{m.value:10.4g} {unit}  ({m.p20:.4g} .. {m.p80:.4g}, n={m.n})",
            flush=True,
        )
        return m

    def save(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)


def read(benchmark: str) -> list[dict[str, str]]:
    """The rows of a committed CSV; none where it wasn't run."""
    path = RESULTS / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return result.stdout.strip() or "unknown"


def command() -> str:
    module = Path(sys.argv[0]).resolve()
    if module.is_relative_to(ROOT):
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        arguments = [Path(x).name if os.path.isabs(x) else x for x in sys.argv[1:]]
        return " ".join(["python -m", name, *arguments])
    return " ".join(sys.argv)


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--model",
        default=os.environ.get("VLLM_SINK_TEST_MODEL", str(ROOT / ".models/smollm2")),
        help="model folder (default: what scripts/setup_env.sh converts)",
    )
    result.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16"],
    )
    result.add_argument("--quick", action="store_true", help="the README's figures")
    result.add_argument(
        "--suffix",
        default="",
        help="of the CSV's name: another machine's rows beside those that are there",
    )
    return result


def prose(model: str, num_tokens: int) -> list[int]:
    """Tokens of real English prose that comes with every Python."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokens = tokenizer(text)["input_ids"]
    if num_tokens > len(tokens):
        raise ValueError(f"context must be <= {len(tokens):,}, got {num_tokens:,}")
    return tokens[:num_tokens]


def flags(engine: str) -> list[str]:
    """What ``vllm``'s commands are given for "sink" or "stock"."""
    if engine == "stock":
        return []
    config = json.dumps(POLICY)
    return ["--attention-backend", "sink", "--additional-config", config]


class Engine:
    """An in-process vLLM engine that is stepped by hand.

    Args:
        name: "sink" or "stock".
        max_model_len: Tokens; the rotary table is extended to them.
        dtype: Of the weights and the cache.
        kwargs: vLLM's engine arguments.
    """

    def __init__(
        self,
        name: str,
        model: str,
        max_model_len: int,
        dtype: str = "float32",
        **kwargs,
    ) -> None:
        from tests.helpers.engine import start_engine
        from vllm_sink.rotation.table_length import overrides_for

        if name == "sink":
            kwargs["attention_backend"] = "sink"
            kwargs["additional_config"] = POLICY
        self.name = name
        self.llm = start_engine(
            model,
            dtype=dtype,
            max_model_len=max_model_len,
            hf_overrides=overrides_for(model, max_model_len),
            **{"max_num_batched_tokens": 2048, "max_num_seqs": 16, **kwargs},
        )
        self.engine = self.llm.llm_engine
        self.num_requests = 0
        self.num_output_tokens = 0

    def add(self, tokens: list[int], num_output_tokens: int) -> None:
        from vllm import SamplingParams

        self.num_requests += 1
        self.engine.add_request(
            f"{self.name}-{self.num_requests}",
            {"prompt_token_ids": tokens},
            SamplingParams(
                temperature=0, max_tokens=num_output_tokens, ignore_eos=True
            ),
        )

    def step(self) -> float:
        """Seconds of one engine step."""
        start = time.perf_counter()
        outputs = self.engine.step()
        elapsed = time.perf_counter() - start
        for output in outputs:
            self.num_output_tokens = len(output.outputs[0].token_ids)
        return elapsed

    def close(self) -> None:
        """Give the memory back."""
        self.engine.engine_core.shutdown()
        del self.engine, self.llm

    def is_busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def waiting(self) -> bool:
        """Whether a request still waits for its first token."""
        scheduler = self.scheduler
        return bool(scheduler.waiting) or any(
            request.num_computed_tokens < request.num_prompt_tokens
            for request in scheduler.running
        )

    @property
    def scheduler(self):
        return self.engine.engine_core.engine_core.scheduler

    def live_blocks(self) -> int:
        """KV blocks that live requests hold; the null block isn't one."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
