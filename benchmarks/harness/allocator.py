"""Keeps the temporaries of one call for the next, where the C library lets us.

glibc may hand a large freed block back to the system, and then the next call pays a
page fault for every 4 KiB of it: up to half of a call's time, or nothing, depending on
where the block happened to lie. The benchmarks turn that off for everything they time.
Users get the same with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1` in the
environment.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_* of malloc.h


def keep_freed_memory() -> bool:
    """Asks glibc to keep what is freed; False where there is no glibc to ask."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))
