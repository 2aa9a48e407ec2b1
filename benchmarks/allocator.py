"""The memory allocator of a timed process."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of options in malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that tensors free, so that no time is one of page faults.

    By default it gives large blocks back to the system or not, depending on what was freed before;
    fetching them anew can take longer than a small layer.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
