"""``scripts/test.sh --changed`` finds the tests that a change may break."""

import pytest

from tests import changed

ROOT = changed.ROOT


def found(name: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in changed.find([ROOT / name])}


@pytest.mark.parametrize(
    "file, test",
    [
        ("vllm_sink/policy/layout.py", "tests/policy/test_layout.py"),
        # By the plugin alone: the test imports vLLM's engine and nothing of ours.
        ("vllm_sink/attention/gpu.py", "tests/gpu_path/test_engine.py"),
        ("kernels/vllm_sink_kernels/reference.py", "tests/kernels/test_attention.py"),
        ("kernels/vllm_sink_kernels/cpu/flash.py", "tests/attention/test_exact.py"),
        ("tests/kernels/batches.py", "tests/kernels/test_attention.py"),
        ("tests/helpers/engine.py", "tests/runner_v2/test_serving.py"),
        ("tests/runner_v2/conftest.py", "tests/runner_v2/test_serving.py"),
        ("tests/policy/test_layout.py", "tests/policy/test_layout.py"),
        # Read, not imported.
        ("docs/refusals.md", "tests/tools/test_check.py"),
        ("scripts/gpu_check.py", "tests/kernels/test_gpu_check.py"),
        # Any source may hold the old text of a mutant.
        ("vllm_sink/tools/sizing.py", "tests/policy/test_mutants.py"),
    ],
)
def test_reached(file, test):
    assert (ROOT / file).is_file() and (ROOT / test).is_file()
    assert test in found(file)


def test_not_everything_is_reached():
    assert "tests/policy/test_layout.py" not in found("vllm_sink/attention/gpu.py")
    assert "tests/attention/test_exact.py" not in found("vllm_sink/tools/sizing.py")
    assert found("-".join(["no", "file.md"])) == set(changed.READERS)
    assert found("scripts/t" + ".sh") == set(changed.READERS), "a part of test.sh"
    assert not changed.find([])
