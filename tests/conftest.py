"""Settings that make an engine start in seconds, set before vLLM is imported."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest

MODEL = os.environ.get("VLLM_SINK_TEST_MODEL", "")


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of SmolLM2-135M-Instruct; scripts/test.sh prepares it."""
    if not os.path.isdir(MODEL):
        pytest.fail(
            "VLLM_SINK_TEST_MODEL must be a model folder, got "
            f"{MODEL!r}; run scripts/test.sh"
        )
    return MODEL


@pytest.fixture(scope="session")
def reference(model_path):
    from tests.helpers.dense_reference import DenseReference

    return DenseReference(model_path)


@pytest.fixture(scope="session")
def prose(reference) -> list[int]:
    """Real English prose, about 100,000 tokens (Python's own documentation)."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return reference.tokenizer(text)["input_ids"]
