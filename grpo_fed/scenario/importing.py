"""Imports the objects that a scenario names by an import path, `package.module:Name`.

They come from installed packages and from the folder that a command is called in, but never from the folder of a run:
that holds results, often somebody else's, and its scenario could name a module beside it.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, final

RUN_MARKS = ("scenario.toml", "rounds.jsonl")
"""The files by which the folder of a run is recognised."""


def import_from_working_folder() -> None:
    """Import the user's modules from the current folder too, after all others; not if it belongs to a run."""
    here = Path.cwd()
    if is_in_run(here):
        refuse_imports_from(here)
    elif str(here) not in sys.path:
        sys.path.append(str(here))


def is_in_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, or below one."""
    return any(all((parent / name).is_file() for name in RUN_MARKS) for parent in (folder, *folder.parents))


def refuse_imports_from(folder: Path) -> None:
    """Let no module be imported any more whose file is below a folder."""
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _RunFolderGuard)), None)
    if finder is None:
        finder = _RunFolderGuard()
        sys.meta_path.insert(0, finder)
    finder.folders.add(folder.resolve())


@final
class _RunFolderGuard(MetaPathFinder):
    """Refuses modules that are in the folders of runs, under whatever name and from whatever entry of `sys.path`."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ModuleNotFoundError for such a module; leave all others to the finders that follow."""
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None and spec.has_location:
            for parent in Path(spec.origin).resolve().parents:
                if parent in self.folders:
                    raise ModuleNotFoundError(
                        f"{fullname} is in {parent}, the folder of a run, from which nothing is imported", name=fullname
                    )
        return None


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
