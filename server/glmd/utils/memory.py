"""What a process costs the machine in memory."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import psutil

_RUSAGE_INFO_V0 = 0


class _RusageInfo(ctypes.Structure):
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
    """Bytes of memory that a process occupies.

    On macOS the physical footprint, which Activity Monitor calls "Memory" and by which the system
    chooses whom to end: it counts what was compressed or swapped out and what the GPU holds, as
    the resident size does not. Elsewhere the resident size. (Linux's proportional size would be
    fairer to shared pages, but the kernel walks all page tables for it: 0.1 s for 20 GB.)

    Args:
        pid: of the process; None: this one.

    Raises:
        psutil.NoSuchProcess: there is no such process, or it belongs to another user.
    """
    pid = os.getpid() if pid is None else pid
    if sys.platform == "darwin":
        return _physical_footprint(pid)
    return int(psutil.Process(pid).memory_info().rss)


def _physical_footprint(pid: int, library: Any = None) -> int:
    library = library or ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    info = _RusageInfo()
    if library.proc_pid_rusage(pid, _RUSAGE_INFO_V0, ctypes.byref(info)):
        raise psutil.NoSuchProcess(pid)
    return int(info.ri_phys_footprint)
