"""How a process on CPU gets its memory: freed blocks are kept for the next ones, tensors lie on huge pages."""

from __future__ import annotations

import ctypes
import os
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


@cache
def keep_freed_memory() -> None:
    """Has this process keep freed blocks for the next ones. By default large blocks come from the system anew each
    time, page by page, zeroed: a third of the CPU time of a task that works on one large array after the other.
    Elsewhere than on glibc nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages() -> None:
    """Has torch ask for huge pages for CPU tensors of 2 MB and more, where ``THP_MEM_ALLOC_ENABLE`` does not say
    otherwise: a step goes over arrays of some MB again and again, and then misses the processor's TLB less. To be
    called before the first tensor is made, which importing TorchRec does; torch looks once. Nothing changes where the
    kernel has no huge pages, or never gives them."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_freed_memory() -> None:
    """Gives what is free back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
