"""The C library's allocator, told to keep what it frees."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Reuse freed blocks of any size below 1 GiB instead of returning them to the kernel.

    By default glibc maps every large tensor afresh, and the kernel zeroes it page by page: a fifth of a training
    step on a CPU. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
