"""The C library's allocator, told to keep what is freed: stacked tensors come and go with every update."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of mallopt's parameters in glibc's malloc.h."""
KEPT = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """For the whole process, once; whether the allocator took it (glibc's does, others have no such switch).

    By default glibc gives blocks above 128 KB back to the kernel when they are freed and faults them in again when they
    are needed: a proximal step on 16 clients takes 3 to 6 times as long for it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(MMAP_THRESHOLD, KEPT) and library.mallopt(TRIM_THRESHOLD, KEPT))
