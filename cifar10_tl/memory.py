"""How the C library deals with the memory of large tensors."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory of tensors it has freed, for those that come next; False where it cannot.

    Otherwise glibc asks the system for each buffer of 32 MiB or more anew, which fills it with zeros, page by page: a
    step of ResNet50 in fp32 at 128 px takes 1.7 times as long for it (see docs/performance.md). For a process that is
    about tensors on a CPU: its memory stays at its peak to its end.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD. Other C libraries than glibc are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, _LARGEST)])
