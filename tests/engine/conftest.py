import pytest


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
