"""Settings that make an engine start in seconds, set before vLLM is imported."""

import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest

MODEL = os.environ.get("VLLM_SINK_TEST_MODEL", "")


@pytest.fixture(scope="session", autouse=True)
def _what_vllm_repeats_is_done_once():
    """Half of what an engine's start costs in a process that has started one before."""
    if "vllm" not in sys.modules:
        yield
        return
    from vllm.model_executor.models import registry
    from vllm.triton_utils import dispatcher

    register, seen = dispatcher.register_kernels, set()

    def register_once(overrides):
        """Every start looks through all modules; what matters is if Numba is there."""
        is_new = ("numba" in sys.modules, *overrides) not in seen
        seen.add(("numba" in sys.modules, *overrides))
        if is_new:
            register(overrides)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dispatcher, "register_kernels", register_once)
        # In a new process, 10 s a class, to keep CUDA uninitialised: there is none.
        patches.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield


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
    from tests.helpers.reference import DenseReference

    return DenseReference(model_path)


@pytest.fixture(scope="session")
def prose(reference) -> list[int]:
    """Real English prose, about 100,000 tokens (Python's own documentation)."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return reference.tokenizer(text)["input_ids"]


# A random model beside the real one: mechanisms need no more, and it costs little.
@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> str:
    """Of 3 layers, 4 query and 2 KV heads; 8,192 positions, 512 tokens."""
    from tests.helpers.random_llama import save_llama

    folder = tmp_path_factory.mktemp("tiny")
    return save_llama(folder, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def tiny_reference(tiny_path):
    from tests.helpers.reference import DenseReference

    return DenseReference(tiny_path)


@pytest.fixture(scope="session")
def tiny_text() -> list[int]:
    """70,000 random tokens."""
    import torch

    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 512, (70_000,), generator=generator).tolist()
