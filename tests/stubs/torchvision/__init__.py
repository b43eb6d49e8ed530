"""Stands in for torchvision where a test needs a model class that merely imports it.

PyPI's wheels of torchvision hold operators for CUDA's build of torch and can't be
imported beside the CPU's. vLLM imports a multimodal model's class in a process of its
own, so that a patch of the test's process would not do. No image is ever processed.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import ClassVar

__version__ = "0.28.0"


class _Anything(type):
    """A class that has every attribute one asks for, each another such class."""

    def __getattr__(cls, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {})
        setattr(cls, name, made)
        return made


class _Module(ModuleType):
    """A package that has every class one asks for."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every module below this package is such a one."""

    def find_spec(self, fullname, path, target=None):
        if fullname.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
