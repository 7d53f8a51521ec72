"""Files that are whole or not there at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: str | bytes) -> None:
    """Write beside the place, then move there: a reader sees the old file or the new one, never a part of one."""
    content = data.encode() if isinstance(data, str) else data
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


def _umask() -> int:
    """What the process keeps from others; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
