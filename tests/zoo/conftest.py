"""Fixtures that the zoo shares with the engine's tests."""

from tests.engine.conftest import importable_multimodal_models

__all__ = ["importable_multimodal_models"]
