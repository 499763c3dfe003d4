"""Disk cache: segments in a folder, written and read by separate threads.

Each token of a prefix is written once, however the tree merges its segments. Files that do not
match exactly are removed. One process at a time uses a folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from glmd.kv_cache.disk_file import (
    SUFFIX,
    DamagedFile,
    PrefixDigest,
    Rows,
    StoredSegment,
    host_rows,
    read_rows,
    read_stored,
    write_segment,
)
from glmd.kv_cache.disk_index import DiskIndex, StoredPart
from glmd.kv_cache.node import Keys
from glmd.utils.files import sync

log = logging.getLogger(__name__)

FILE_TOKENS = 1024
"""Most tokens in a file: 55 MB of GLM-4.7-Flash. Larger files would be copied to the device in
longer pauses between steps, and evicted more coarsely."""

FREE_FLOOR = 8 << 30
"""Bytes of the disk that stay free, whatever the capacity."""

HOUR = 3600.0

LOG_INTERVAL = 600.0
"""Seconds between two log lines with the same reason for not writing."""

LOCK_NAME = ".lock"
"""File that is locked while a process uses the folder. It holds the bytes written in total."""

_FILE = re.compile(rf"\.?[0-9a-f]{{32}}{re.escape(SUFFIX)}")
"""Names of finished and unfinished files. Other files in the folder are left alone."""

HostArrays = dict[str, tuple[mx.Dtype, Rows]]
"""dtype and rows, [tokens, …], by the name of an array."""


@dataclass(frozen=True, slots=True)
class SaveJob:
    """A segment to store, with the prefix that it ends.

    Attributes:
        keys: of the whole prefix, in consecutive pieces.
        start: tokens before the segment.
        arrays: the segment's, evaluated or about to be: [tokens, …] each.
    """

    salt: str
    keys: list[Keys]
    start: int
    arrays: Mapping[str, mx.array]


class WriteLimit:
    """Allows a number of bytes per hour, and as many at once after a quiet hour."""

    def __init__(self, hourly: int) -> None:
        self.hourly = hourly
        self._left = float(hourly)
        self._at = time.monotonic()

    def take(self, nbytes: int) -> bool:
        """Count `nbytes` if they are allowed now; returns whether they are."""
        now = time.monotonic()
        self._left = min(self.hourly, self._left + (now - self._at) * self.hourly / HOUR)
        self._at = now
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True


class DiskCache:
    """Stored segments in a folder.

    Args:
        folder: created with mode 0700, locked until `close`.
        capacity: most bytes of all files, and most bytes written per hour: writing more than the
            whole cache in an hour would replace what was hardly read.
        identity: what files must agree with, as of `write_segment`.
        floor: bytes of the disk that stay free.

    Raises:
        OSError: the folder cannot be used, or another process uses it.

    Attributes:
        index: what is stored.
        capacity: as given.
        read_bytes, written_bytes: since the start.
    """

    def __init__(
        self, folder: Path, capacity: int, identity: Mapping[str, str], *, floor: int = FREE_FLOOR
    ) -> None:
        self.index = DiskIndex()
        self.read_bytes = 0
        self.written_bytes = 0
        self._folder = folder
        self.capacity = capacity
        self._identity = dict(identity)
        self._floor = floor
        self._limit = WriteLimit(capacity)
        self._logged: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise
        recorded = os.read(self._lock, 32)
        self._written_before = int(recorded) if recorded.isdigit() else 0
        self._scan()
        self._writer = ThreadPoolExecutor(1, "disk cache writer")
        self._reader = ThreadPoolExecutor(1, "disk cache reader")

    @property
    def written_total(self) -> int:
        """Bytes written into the folder since it was created."""
        return self._written_before + self.written_bytes

    def _scan(self) -> None:
        """Index the files, least recently used first; remove those that do not match."""
        found = [entry for entry in self._folder.iterdir() if _FILE.fullmatch(entry.name)]
        unfinished = [file for file in found if file.name.startswith(".")]
        reasons = dict.fromkeys(unfinished, "is unfinished")
        files = [file for file in found if file not in reasons]
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
            try:
                self.index.add(read_stored(file, self._identity))
            except (DamagedFile, OSError) as error:
                reasons[file] = str(error)
        for file, reason in reasons.items():
            log.info("Disk cache file removed: file=%s reason=%r", file.name, reason)
            file.unlink()
        self._evict(self.index.nbytes - self.capacity)

    def find(self, salt: str, keys: Keys) -> list[StoredPart]:
        """The longest stored prefix of `keys`; see `DiskIndex.find`."""
        return self.index.find(salt, keys)

    # -- writing --------------------------------------------------------------------------------

    def save(self, job: SaveJob) -> Future[bool]:
        """Store what is missing of a segment, in the background.

        Returns:
            whether the tokens before the segment are stored, without which it is not.
        """
        return self._writer.submit(self._save, job)

    def _save(self, job: SaveJob) -> bool:
        keys = np.concatenate(job.keys).astype(np.int64, copy=False)
        parts = self.index.find(job.salt, keys)
        start = parts[-1].end if parts else 0
        if start < job.start:
            return False
        digest = PrefixDigest(job.salt)
        digest.add(keys[:start])
        written = self.written_bytes
        while start < len(keys):
            end = min(start + FILE_TOKENS, len(keys))
            parent = str(digest)
            digest.add(keys[start:end])
            stored = StoredSegment(str(digest), parent, start, keys[start:end], 0)
            arrays = {
                name: (array.dtype, host_rows(array, start - job.start, end - job.start))
                for name, array in job.arrays.items()
            }
            if not self._write(stored, arrays):
                break
            start = end
        if self.written_bytes > written:
            try:
                sync(self._folder)
            except OSError as error:
                self._log_refusal(error)
        return True

    def _write(self, stored: StoredSegment, arrays: HostArrays) -> bool:
        """Write a file and index it; False: there is no room, or the disk refuses it."""
        # The header has 11 bytes per token, and less than 200 per array.
        size = sum(rows.nbytes for _, rows in arrays.values())
        size += 4096 + 11 * len(stored) + 200 * len(arrays)
        try:
            if not self._make_room(size):
                return False
            file = self._file(stored.name)
            nbytes = write_segment(file, stored, arrays, self._identity)
        except OSError as error:
            self._log_refusal(error)
            return False
        self.index.add(replace(stored, nbytes=nbytes))
        self.written_bytes += nbytes
        return True

    def _make_room(self, size: int) -> bool:
        """Remove files until `size` bytes fit; False: they must not be written now."""
        if size > self.capacity:
            return False
        self._evict(self.index.nbytes + size - self.capacity)
        if (short := self._short_of(size)) > 0:
            self._evict(short)
            if self._short_of(size) > 0:
                self._log_once(f"less than {self._floor >> 20} MiB would stay free on the disk")
                return False
        if not self._limit.take(size):
            self._log_once(f"the limit of {self._limit.hourly >> 20} MiB per hour is reached")
            return False
        return True

    def _short_of(self, size: int) -> int:
        """Bytes that are missing for `size` bytes above the floor."""
        return size + self._floor - shutil.disk_usage(self._folder).free

    def _evict(self, nbytes: int) -> None:
        """Remove files of `nbytes` or more, least recently used first."""
        while nbytes > 0 and (stored := self.index.oldest()) is not None:
            nbytes -= stored.nbytes
            self._remove(stored)

    def _remove(self, stored: StoredSegment) -> None:
        self.index.remove(stored.name)
        try:
            self._file(stored.name).unlink(missing_ok=True)
        except OSError as error:
            self._log_refusal(error)

    def _file(self, name: str) -> Path:
        return self._folder / (name + SUFFIX)

    def _log_refusal(self, error: OSError) -> None:
        self._log_once(f"the disk refuses it: {error.strerror or error}")

    def _log_once(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._logged.get(reason, -LOG_INTERVAL) >= LOG_INTERVAL:
            self._logged[reason] = now
            log.warning("Disk cache does not write: reason=%r", reason)

    # -- reading --------------------------------------------------------------------------------

    def read(self, stored: StoredSegment) -> Future[HostArrays | None]:
        """Read a segment into host memory, in the background; None: it is gone."""
        return self._reader.submit(self._read, stored)

    def _read(self, stored: StoredSegment) -> HostArrays | None:
        file = self._file(stored.name)
        try:
            arrays = read_rows(file, stored, self._identity)
            os.utime(file)
        except FileNotFoundError:
            self.index.remove(stored.name)  # Evicted since it was found, or removed by hand.
            return None
        except (DamagedFile, OSError) as error:
            log.warning("Disk cache file removed: file=%s reason=%r", file.name, str(error))
            self._remove(stored)
            return None
        self.read_bytes += stored.nbytes
        return arrays

    def close(self, seconds: float) -> None:
        """Write what was handed over, for at most `seconds`, and release the folder."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        last = self._writer.submit(self._record_use)
        self._writer.shutdown(wait=False)
        if wait([last], seconds).not_done:
            log.warning("Disk cache closed before all was written: seconds=%g", seconds)
            self._writer.shutdown(wait=True, cancel_futures=True)
            self._record_use()
        os.close(self._lock)

    def _record_use(self) -> None:
        """Record the order of use in the files' times, and the bytes written."""
        now = time.time_ns()
        for age, name in enumerate(self.index.names()):
            times = now - 1000 * age
            try:
                os.utime(self._file(name), ns=(times, times))
            except FileNotFoundError:
                self.index.remove(name)
        os.pwrite(self._lock, str(self.written_total).encode(), 0)
