"""Fixtures that the tools' tests share with the engine's."""

from tests.engine.conftest import importable_multimodal_models

__all__ = ["importable_multimodal_models"]
