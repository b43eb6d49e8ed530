"""Set-up of the compiled kernels' tests: Triton's compiler, no interpreter.

Run in a pytest process of its own, without TRITON_INTERPRET. A second run takes the
Triton that the next vLLM's torch pins. Once (a download of 248 MB)::

    bash -c 'source scripts/setup_env.sh; fetch_next_triton'

then, for the default cases or, with KERNELS_AOT=all, every shipped one::

    PYTHONPATH=$PWD/.venv-next/triton-3.8.0 VLLM_SINK_EXPECT_TRITON=3.8.0 \\
        .venv/bin/python -m pytest tests/kernels_aot
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    import triton

    expected = os.environ.get("VLLM_SINK_EXPECT_TRITON", triton.__version__)
    if triton.__version__ != expected:
        raise pytest.UsageError(
            f"Triton must be {expected}, got {triton.__version__} from "
            f"{triton.__file__}; put the folder that has it first on PYTHONPATH"
        )


def pytest_report_header() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "kernels_aot: SKIPPED under TRITON_INTERPRET=1; run it by itself"
    import triton

    return f"kernels_aot: Triton {triton.__version__}"
