"""The GPU path without a GPU: vLLM around kernels that Triton interprets.

Run by itself, since Triton reads its switch once:
``TRITON_INTERPRET=1 python -m pytest tests/gpu_path``.
"""

import os
import sys

import pytest
import torch

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


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Of 4 query heads, 2 KV heads and 2 layers."""
    from tests.helpers.random_llama import save_llama

    return save_llama(
        tmp_path_factory.mktemp("llama"),
        vocab_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Both past the window of 24 tokens; one ends while the other is prefilled."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(1, 128, (length,), generator=generator).tolist()
        for length in (31, 75)
    ]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which of the launchers ran, in order."""
    from vllm_sink.attention import gpu

    called: list[str] = []
    for name in ("Decode", "Prefill", "Write"):
        launcher = getattr(gpu, f"{name}Launcher")
        launch = launcher.__call__

        def record(*args, name=name, launch=launch, **kwargs):
            called.append(name.lower())
            return launch(*args, **kwargs)

        monkeypatch.setattr(launcher, "__call__", record)
    return called
