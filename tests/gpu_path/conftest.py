"""The GPU path without a GPU: vLLM around kernels that Triton interprets.

Run by itself, since Triton reads its switch once:
``TRITON_INTERPRET=1 python -m pytest tests/gpu_path``.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    if INTERPRETED:
        return "gpu_path: Triton's interpreter"
    return (
        "gpu_path: SKIPPED, Triton was imported without TRITON_INTERPRET=1; run "
        "`TRITON_INTERPRET=1 python -m pytest tests/gpu_path` by itself"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
