"""What a process costs in memory, as the system counts it."""

from __future__ import annotations

import ctypes
import mmap
import sys

import psutil
import pytest

from glmd.utils import memory as footprint
from glmd.utils.memory import _physical_footprint, _RusageInfo


def test_memory_that_is_written_to_counts() -> None:
    before = footprint.process_memory_bytes()
    size = 64 << 20
    # Straight from the system: an allocator may have as much left over from earlier tests.
    with mmap.mmap(-1, size) as block:
        for place in range(0, size, mmap.PAGESIZE):
            block[place] = 1
        assert footprint.process_memory_bytes() - before >= 0.9 * size


def test_a_process_that_is_not_there_is_said_to_be() -> None:
    with pytest.raises(psutil.NoSuchProcess):
        footprint.process_memory_bytes(2**22 + 1)


def test_macos_is_asked_for_the_field_at_its_place_in_the_header() -> None:
    """<sys/resource.h>: a UUID of 16 bytes, then ten 64-bit numbers, of which it is the eighth."""
    assert ctypes.sizeof(_RusageInfo) == 96
    assert _RusageInfo.ri_phys_footprint.offset == 16 + 7 * 8

    class Library:
        @staticmethod
        def proc_pid_rusage(pid: int, flavor: int, out: object) -> int:
            if flavor:
                return -1
            ctypes.cast(out, ctypes.POINTER(_RusageInfo))[0].ri_phys_footprint = pid << 40
            return 0

    assert _physical_footprint(7, Library) == 7 << 40


@pytest.mark.skipif(sys.platform != "darwin", reason="only on macOS")
def test_on_macos_it_is_of_the_order_of_the_resident_size() -> None:
    resident = psutil.Process().memory_info().rss
    assert 0.1 * resident < footprint.process_memory_bytes() < 10 * resident
