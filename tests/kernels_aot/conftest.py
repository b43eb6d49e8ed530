"""Compilation needs the kernels as Triton compiles them: no interpreter here.

Run in a pytest process of its own, without TRITON_INTERPRET.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "kernels"), str(HERE)]
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "kernels_aot: SKIPPED under TRITON_INTERPRET=1; run it by itself"
    return None
