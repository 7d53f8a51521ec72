"""Writes files so that they are complete or missing, whenever the process or the machine stops; follows no links."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter, and those above it; one that exists is closed to others."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def write_atomic(path: Path, data: str | bytes, private: bool = False) -> None:
    """Write a temporary file and move it to `path`: a reader sees the old file or the new one, never a part of it.

    private: only the file's owner may read it, whatever the process's mask.
    """
    content = data.encode() if isinstance(data, str) else data
    with _name_file_in_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o600 if private else 0o666 & ~_umask())  # mkstemp gives its files to their owner alone
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to a file that is never written to again, or a copy where the file system has no links.

    FileExistsError if there is anything under the target's name, which is never replaced.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        if target.is_symlink() or target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        write_atomic(target, source.read_bytes(), private=not source.stat().st_mode & 0o077)


def refuse_links(folder: Path, path: Path) -> None:
    """ValueError if a path below a folder is a symbolic link, or leads through one."""
    for part in (path, *path.parents):
        if part == folder:
            return
        if part.is_symlink():
            raise ValueError(f"{part}: is a link; put what it leads to in its place")
    raise AssertionError(f"{path} is not below {folder}")


def append_line(path: Path, line: str, durable: bool = False, size: int | None = None) -> None:
    """Add a line to a file, or nothing if the disk has no room for all of it.

    durable: whether the line survives a power cut once this returns. size: how long the file was before the line; what
    an interrupted attempt has left behind is removed. OSError names the file; a link is not followed.
    """
    content = f"{line}\n".encode()
    with _name_file_in_errors(path), open(path, "ab", buffering=0, opener=_open_no_link) as file:
        before = file.tell() if size is None else size
        file.truncate(before)
        if file.write(content) < len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fsync(file.fileno())


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Add the file's path to an OSError, which a failed write does not have."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    """Read the process's file mode mask, which is only possible by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
