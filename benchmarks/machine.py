"""The CPU: its name, what it multiplies, the dtype that is fast on it; the GPU."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine() -> str:
    """The CPU's name, as the kernel says it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# What decides how fast a CPU multiplies, of the kernel's names.
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
VECTOR_FLAGS += ("asimd", "bf16", "sve")


def cpu_flags() -> str:
    """The CPU's vector extensions, separated by spaces."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            known = line.split(":", 1)[1].split()
            return " ".join(flag for flag in VECTOR_FLAGS if flag in known)
    return ""


def fast_dtype() -> str:
    """bfloat16 where the CPU multiplies it, else float32."""
    native = {"avx512_bf16", "amx_bf16", "bf16"}
    return "bfloat16" if native & set(cpu_flags().split()) else "float32"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


def gpu_machine() -> dict[str, str]:
    """The GPU of this process, and what runs on it; columns of a CSV."""
    import torch

    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {}
    for name in ("triton", "vllm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": torch.version.hip or _first_line(*query),
        "torch": torch.__version__,
        **versions,
        "commit": _first_line("git", "rev-parse", "--short", "HEAD"),
    }


def write_gpu_rows(
    rows: Sequence[dict[str, Any]], stem: str, path: Path | None
) -> None:
    """A CSV of rows and where they were measured.

    Args:
        path: Left out: ``benchmarks/results/STEM_GPU.csv``.
    """
    here = gpu_machine()
    slug = "-".join(here["gpu"].lower().split())
    path = path or Path(__file__).parent / f"results/{stem}_{slug}.csv"
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [*rows[0], *here], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | here for row in rows)
    print(f"{len(rows)} rows in {path}")
