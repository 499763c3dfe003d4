"""Memory use and garbage collection of a process."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

import psutil

RUSAGE_INFO_V0 = 0


class RusageInfo(ctypes.Structure):
    """`struct rusage_info_v0` of macOS's <sys/resource.h>."""

    _fields_ = [
        ("ri_uuid", ctypes.c_uint8 * 16),
        *(
            (name, ctypes.c_uint64)
            for name in (
                "ri_user_time",
                "ri_system_time",
                "ri_pkg_idle_wkups",
                "ri_interrupt_wkups",
                "ri_pageins",
                "ri_wired_size",
                "ri_resident_size",
                "ri_phys_footprint",
                "ri_proc_start_abstime",
                "ri_proc_exit_abstime",
            )
        ),
    ]


def process_memory_bytes(pid: int | None = None) -> int:
    """Return the memory use of a process in bytes.

    macOS: the physical footprint, shown as "Memory" in Activity Monitor, which includes compressed
    and swapped memory and GPU memory. Elsewhere: the resident set size. (Linux's proportional set
    size takes 0.1 s for 20 GB because the kernel walks all page tables.)

    Args:
        pid: process id. None: this process.

    Raises:
        psutil.NoSuchProcess: no such process exists, or the process belongs to another user.
    """
    pid = os.getpid() if pid is None else pid
    if sys.platform == "darwin":
        return physical_footprint(pid)
    return int(psutil.Process(pid).memory_info().rss)


def physical_footprint(pid: int, library: Any = None) -> int:
    library = library or ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    info = RusageInfo()
    if library.proc_pid_rusage(pid, RUSAGE_INFO_V0, ctypes.byref(info)):
        raise psutil.NoSuchProcess(pid)
    return int(info.ri_phys_footprint)


def freeze_gc_heap() -> None:
    """Exclude all objects that exist now from later garbage collections.

    A full collection takes 40 ms in the API process and 80 ms in the engine process, during which
    all streams stall.
    """
    gc.collect()
    gc.freeze()


M_MMAP_THRESHOLD, MMAP_BYTES = -3, 1 << 20
"""Parameter of glibc's mallopt: bytes from which a block is a mapping of its own."""

M_ARENA_MAX, ARENAS = -8, 2
"""Parameter of glibc's mallopt: heaps, of which each keeps its largest size for its threads."""


def return_large_blocks() -> None:
    """Have the allocator return large free blocks to the system at once.

    glibc raises its threshold to the size of the largest block that was ever freed, 32 MiB, and
    keeps twice that. macOS's allocator needs no advice.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        library.mallopt(M_ARENA_MAX, ARENAS)


def return_free_memory() -> None:
    """Free unreachable objects, and have the allocator return free pages to the system.

    Cycles that hold large bodies, such as of an exception and its frames, wait for a collection
    otherwise, and pages between blocks in use stay with glibc. Takes a few milliseconds where the
    heap was frozen (`freeze_gc_heap`).
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


EXIT_OUT_OF_MEMORY = 70


def exit_if_out_of_memory(error: BaseException | None) -> None:
    """End the process at once if `error` is, or was caused by, a MemoryError.

    A process that goes on without memory fails at random places and may never end. The engine ends
    with this process, and the service manager starts both again.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            os.write(2, b"ERROR glmd: out of memory. The server ends.\n")
            os._exit(EXIT_OUT_OF_MEMORY)
        error = error.__cause__ or error.__context__
