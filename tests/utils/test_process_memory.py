"""Memory use of a process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import psutil
import pytest

from glmd.utils.memory import (
    RusageInfo,
    physical_footprint,
    process_memory_bytes,
    return_free_memory,
)


def test_written_memory_counts() -> None:
    before = process_memory_bytes()
    size = 64 << 20
    # mmap, because an allocator may reuse memory of earlier tests.
    with mmap.mmap(-1, size) as block:
        for offset in range(0, size, mmap.PAGESIZE):
            block[offset] = 1
        assert process_memory_bytes() - before >= 0.9 * size


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only on glibc")
def test_free_memory_between_blocks_in_use_is_returned() -> None:
    blocks: list[Any] = [bytes(4000) for _ in range(16_000)]
    kept = blocks[::1000]
    blocks.append(blocks)  # a cycle
    del blocks
    before = process_memory_bytes()
    return_free_memory()
    assert process_memory_bytes() < before - (32 << 20)
    assert len(kept) == 16


def test_a_missing_process_raises_no_such_process() -> None:
    with pytest.raises(psutil.NoSuchProcess):
        process_memory_bytes(2**22 + 1)


def test_macos_reads_the_footprint_at_its_offset() -> None:
    """<sys/resource.h>: a UUID of 16 bytes, then ten 64-bit numbers; the footprint is the 8th."""
    assert ctypes.sizeof(RusageInfo) == 96
    assert RusageInfo.ri_phys_footprint.offset == 16 + 7 * 8

    class Library:
        @staticmethod
        def proc_pid_rusage(pid: int, flavor: int, out: Any) -> int:
            if flavor:
                return -1
            ctypes.cast(out, ctypes.POINTER(RusageInfo))[0].ri_phys_footprint = pid << 40
            return 0

    assert physical_footprint(7, Library) == 7 << 40


@pytest.mark.skipif(sys.platform != "darwin", reason="only on macOS")
def test_the_macos_footprint_is_near_the_resident_size() -> None:
    resident = psutil.Process().memory_info().rss
    assert 0.1 * resident < process_memory_bytes() < 10 * resident
