"""scripts/gpu_check.py runs; without a GPU, its correctness part."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_correctness_part_passes_under_the_interpreter():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.gpu_check", "--part", "correctness"),
            *("--interpret", "--quick"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed" in done.stdout


def test_the_engines_part_is_the_script_that_tests_of_runner_v2_run(monkeypatch):
    from scripts import gpu_check

    commands = []

    def run(command, cwd):
        commands.append((command, cwd))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "INTERPRET", True)
    assert gpu_check.engine() == 3
    script = [sys.executable, "-m", "scripts.engine_check", "--interpret"]
    assert commands == [(script, ROOT)]


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


def test_every_variant_is_checked_timed_and_written(monkeypatch, tmp_path):
    """``--part prefill mixes`` on a small layer: rows lie on disk as they come."""
    import torch

    from benchmarks import gpu_kernels, gpu_mixes, gpu_prefill, gpu_rows

    small = {"head_size": 16, "block_size": 16, "dtype": torch.float16}
    for module, name, value in (
        (gpu_kernels, "bench", lambda fn, repeats: (fn(), (2.0, 1.0, 3.0))[1]),
        (gpu_kernels, "graphed", lambda fn: fn),
        (gpu_kernels, "flash", gpu_prefill_window),
        (gpu_kernels, "HEADS", (8, 4)),
        (gpu_kernels, "HEAD_SIZE", 16),
        (gpu_kernels, "LAYOUT", small),
        (gpu_kernels, "RETRIEVAL_POLICY", (4, 12)),
        (gpu_prefill, "LENGTHS", ([190], [3])),
        (gpu_prefill, "BLOCK_SIZES", (16,)),
        (gpu_prefill, "TILES", {"shipped": gpu_prefill.SHIPPED}),
        (gpu_prefill, "POLICIES", ((20, 150),)),
        (gpu_prefill, "PROMPTS", [(40, 4, 12)]),
        (gpu_mixes, "CHECKED", ([90, 1], [(0, 4096), (4, 60), (4, 60), (0, 4096)])),
        (gpu_mixes, "TILES", {"small": gpu_mixes.TILES["16 keys, 2 warps"]}),
        (gpu_mixes, "COUNTS", (0, 1, 4)),
        (gpu_mixes, "BATCHES", (2,)),
        (gpu_mixes, "NUM_TOKENS", 40),
        (gpu_rows, "gpu_machine", lambda: {"gpu": "none"}),
    ):
        monkeypatch.setattr(module, name, value)
    for part, rows in ((gpu_prefill, 3 + 1), (gpu_mixes, 3 * 2)):
        path = tmp_path / part.__name__
        assert part.run(gpu_rows.RowFile("", path), 1) == 0
        assert len(path.read_text().splitlines()) == 1 + rows


def gpu_prefill_window(x, window):
    """FlashAttention's stand-in, as ``gpu_kernels.flash`` gives it."""
    from benchmarks import gpu_prefill

    out = x.q.clone()
    return lambda: gpu_prefill.find_attention()(
        *x.args[:3],
        max_seqlen_q=x.max_query_len,
        cu_seqlens_q=x.starts,
        max_seqlen_k=int(x.lens.max()),
        seqused_k=x.lens,
        softmax_scale=0.25,
        causal=True,
        window_size=[window - 1, 0] if window else [-1, -1],
        block_table=x.safe_table(),
        return_softmax_lse=True,
        out=out,
        fa_version=3,
    )
