"""Imports a package's public names on first use, so that importing the package alone stays fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_getattr(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package (PEP 562), which raises AttributeError for names that are not public.

    modules: every public name of the package, with the module that defines it.
    """

    def getattr_of_package(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(modules))}")
        return getattr(import_module(modules[name]), name)

    return getattr_of_package
