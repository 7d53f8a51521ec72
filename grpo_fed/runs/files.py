"""Files that are whole or not there at all, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write beside the place, then move there: a reader sees the old file or the new one, never a part of one."""
    content = data.encode() if isinstance(data, str) else data
    with _named(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o666 & ~_umask())  # mkstemp's are its owner's alone
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def link_or_copy(file: Path, place: Path) -> None:
    """A second name for a file that nobody writes to, or a copy where the disk cannot give it one."""
    try:
        os.link(file, place)
    except OSError:
        write_atomic(place, file.read_bytes())


def append_line(path: Path, line: str, durable: bool = False) -> None:
    """Add a line to a file; where the disk has no room for all of it, nothing. durable: it bears a power cut."""
    content = f"{line}\n".encode()
    with _named(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        if file.write(content) < len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fsync(file.fileno())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says of what the machine refuses which file it was about: a write does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    """What the process keeps from others; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
