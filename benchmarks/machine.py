"""The CPU: its name, what it multiplies, the dtype that is fast on it."""

from __future__ import annotations

import platform
from pathlib import Path


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
