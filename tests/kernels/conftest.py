"""Kernel tests run under Triton's interpreter, in a pytest process of their own.

Triton decides when it decorates a kernel whether to interpret it, so the switch
must be set before anything imports the kernels:
``TRITON_INTERPRET=1 python -m pytest tests/kernels``. On a GPU the same tests run
compiled: ``TRITON_INTERPRET=0 python -m pytest tests/kernels``.

bf16 stays out of these tests: ``tl.dot`` on bf16 gives garbage in the interpreter
of Triton 3.9 (errors of 1e11), where fp16 and fp32 are right. bf16 is compiled in
tests/kernels_aot and its numerics are checked on a GPU by scripts/gpu_check.py.
"""

import os
import sys

import pytest
import torch

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available()
if COMPILED:
    torch.set_default_device("cuda")
    # These look into the interpreter, or at the host's side alone.
    collect_ignore = ["test_loads.py", "test_launchers.py", "test_gpu_check.py"]
elif not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
torch.set_num_threads(1)


def pytest_report_header() -> str:
    if INTERPRETED:
        return "kernels: Triton's interpreter"
    if COMPILED:
        return f"kernels: compiled, on {torch.cuda.get_device_name()}"
    return (
        "kernels: SKIPPED, Triton was imported without TRITON_INTERPRET=1; run "
        "`TRITON_INTERPRET=1 python -m pytest tests/kernels` by itself"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
