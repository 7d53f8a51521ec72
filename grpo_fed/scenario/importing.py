"""Imports the objects that a scenario names by an import path, `package.module:Name`."""

from __future__ import annotations

import importlib
import operator
from typing import Any


def import_object(path: str) -> Any:
    """Import an object; ValueError says why that failed and what to do."""
    module, _, name = path.partition(":")
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:
        raise ValueError(f"cannot be imported: {describe_exception(error)}") from error


def describe_exception(error: Exception) -> str:
    """Describe an exception on one line, with a cure for a missing module."""
    cure = "; is it installed, or on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
    return f"{type(error).__name__}: {error}{cure}"
