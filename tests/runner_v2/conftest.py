"""vLLM's model runner V2, which CUDA users get by default, on a machine without a GPU.

Run by itself, once a vLLM version (scripts/test.sh runs both)::

    TRITON_INTERPRET=1 python -m pytest tests/runner_v2
    PYTHONPATH=$PWD/.venv-next/0.33.0 VLLM_SINK_EXPECT_VLLM=0.33.0 \\
        TRITON_INTERPRET=1 python -m pytest tests/runner_v2

Triton interprets V2's own kernels as well as ours. vLLM takes V2 wherever it finds
Triton usable, which on a CPU it decides once, at import, by looking for Triton's
backend of the name "cpu": a stand-in of that name is there for as long as that
takes. No kernel asks it for anything.
"""

import os
import sys
import types

import pytest

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and "vllm" not in sys.modules
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


def import_vllm_with_triton() -> None:
    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
    try:
        import vllm.triton_utils

        assert vllm.triton_utils.HAS_TRITON, "vLLM must find Triton usable"
    finally:
        del backends["cpu"]


if INTERPRETED:
    import_vllm_with_triton()


def pytest_report_header() -> str:
    if not INTERPRETED:
        return (
            "runner_v2: SKIPPED, Triton or vLLM was imported before; run "
            "`TRITON_INTERPRET=1 python -m pytest tests/runner_v2` by itself"
        )
    import vllm

    return f"runner_v2: vLLM {vllm.__version__}, Triton's interpreter"


@pytest.fixture(scope="session", autouse=True)
def _vllm_is_the_one_that_was_asked_for() -> None:
    import vllm

    expected = os.environ.get("VLLM_SINK_EXPECT_VLLM", vllm.__version__)
    assert vllm.__version__.split("+")[0] == expected.split("+")[0]
