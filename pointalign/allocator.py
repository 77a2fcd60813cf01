"""How the C library hands freed memory back to the system."""

import ctypes


def keep_freed_memory() -> None:
    """Let glibc reuse large buffers: returning them to the system takes ten times as long as computing with them."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, without this setting; Windows names no library
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of malloc.h
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20)):
        mallopt(option, value)
