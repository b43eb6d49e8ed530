"""scripts/gpu_check.py runs; without a GPU, its correctness part."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_check.py"


def test_correctness_part_passes_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--interpret", "--quick"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", 0 failed") == 2, done.stdout  # kernels and engine


def test_times_are_taken_of_every_kernel_and_peers_may_be_missing(monkeypatch):
    """Everything but the clock and the graphs, on a small layer."""
    import torch

    from benchmarks import gpu_kernels

    calls = []

    def bench(fn, repeats):
        calls.append(fn())
        return 2.0, 1.0, 3.0

    small = {"head_size": 16, "block_size": 16, "dtype": torch.float16}
    for name, value in {
        "bench": bench,
        "graphed": lambda fn: fn,
        "flex": lambda *args: lambda: None,
        "HEADS": (16, 8),
        "HEAD_SIZE": 16,
        "DTYPE": torch.float16,
        "LAYOUT": small,
        "RETRIEVAL_DECODE": (1, 40),
        "RETRIEVAL_PROMPT": 24,
        "RETRIEVAL_POLICY": (4, 12),
    }.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    table = gpu_kernels.Table(1)
    gpu_kernels.time_decode(table, [(2, 4, 12)])
    gpu_kernels.time_prefill(table, [(40, 4, 12)])
    gpu_kernels.time_retrieval(table)
    assert all(not out.isnan().any() for out in calls if out is not None)
    ours = [row["what"] for row in table.rows if row["what"].startswith("sink")]
    assert len(ours) == 2 + 1 + 2 * len(gpu_kernels.RETRIEVAL)
    (decode,) = (row for row in table.rows if row["what"] == "sink_decode")
    assert decode["gbps"] == round(2 * 2 * 16 * 8 * 16 * 2 / 2.0 / 1e6, 1)
