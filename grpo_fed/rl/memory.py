"""The C library's allocator, set to keep freed memory: stacked tensors are made and freed with every update."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of mallopt's parameters in glibc's malloc.h."""
KEPT_BYTES = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """Set the allocator for the whole process, once; gives whether it can be set (glibc's can).

    By default glibc returns blocks above 128 KB to the kernel when they are freed, and the next use faults them in
    again: a proximal step on 16 clients takes 3 to 6 times as long.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(MMAP_THRESHOLD, KEPT_BYTES) and library.mallopt(TRIM_THRESHOLD, KEPT_BYTES))
