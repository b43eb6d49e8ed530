"""Fixtures that the engine's tests share."""

import os
import sys
from pathlib import Path

import pytest

STUBS = str(Path(__file__).parents[1] / "stubs")


@pytest.fixture
def as_on_cuda(monkeypatch):
    """vLLM's own platform class decides; ours never sees the configuration."""
    from vllm.platforms import current_platform

    theirs = super(type(current_platform), type(current_platform))
    monkeypatch.setattr(
        type(current_platform),
        "check_and_update_config",
        staticmethod(theirs.check_and_update_config),
    )


@pytest.fixture
def importable_multimodal_models(monkeypatch):
    """Here and in the processes in which vLLM imports a model's class first.

    The stand-in for torchvision is out again afterwards: what imports it by chance
    must go on without.
    """
    before = set(sys.modules)
    monkeypatch.syspath_prepend(STUBS)
    paths = [STUBS, os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]
