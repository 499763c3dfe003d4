"""Least-recently-used entries in an SQLite file, which survive the process."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_SECONDS = 1.0
"""Time to wait for another process that writes."""


class DiskLRU:
    """Values by key in an SQLite table, at most `capacity` bytes in all.

    Thread-safe, and several processes may use a file. A value is returned exactly as it was put or
    not at all. What goes wrong with the file is logged, and the entry is missing then: this is a
    cache, which must not fail who uses it. A damaged file is replaced by an empty one.

    Args:
        file: created with mode 0600, its folder with mode 0700.
        table: an identifier.
        capacity: bytes.
    """

    def __init__(self, file: Path, table: str, capacity: int) -> None:
        self._file = file
        self._table = table
        self._capacity = capacity
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._attempt(self._open)

    def get(self, key: bytes) -> bytes | None:
        """Return a value and mark it as the most recently used. None: no such key."""
        return self._attempt(lambda: self._get(key))

    def put(self, key: bytes, value: bytes) -> None:
        """Add or replace a value. A value larger than the capacity is not stored."""
        self._attempt(lambda: self._put(key, value))

    def delete(self, key: bytes) -> bool:
        """Delete a value; returns whether there was one."""
        return bool(self._attempt(lambda: self._execute("DELETE FROM {} WHERE key = ?", key)[1]))

    def close(self) -> None:
        """Close the file. Nothing is found or stored afterwards."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = None

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Run `work`; None: the file is closed, or refuses it."""
        with self._lock:
            try:
                return work()
            except (sqlite3.OperationalError, OSError) as error:  # Full, locked or not writable.
                log.warning("Stored state refused: file=%s error=%s", self._file, error)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                log.warning(
                    "Stored state damaged and replaced: file=%s error=%s", self._file, error
                )
                self._replace()
            return None

    def _replace(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None
        try:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self._file}{suffix}").unlink(missing_ok=True)
            self._open()
        except (sqlite3.Error, OSError) as error:
            log.warning("Stored state refused: file=%s error=%s", self._file, error)

    def _open(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._database = sqlite3.connect(
            self._file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Complete after a crash of this process; of the system, all but the last entries.
        self._execute("PRAGMA journal_mode = WAL")
        self._execute("PRAGMA synchronous = NORMAL")
        self._execute("PRAGMA secure_delete = FAST")
        self._execute(
            "CREATE TABLE IF NOT EXISTS {}"
            " (key BLOB PRIMARY KEY, value BLOB, digest BLOB, used INTEGER)"
        )
        self._execute("CREATE INDEX IF NOT EXISTS {}_used ON {} (used, length(value))")

    def _get(self, key: bytes) -> bytes | None:
        rows, _ = self._execute("SELECT value, digest FROM {} WHERE key = ?", key)
        for value, digest in rows:
            if not isinstance(value, bytes) or _digest(key, value) != digest:
                raise sqlite3.DatabaseError("an entry has a wrong digest")
            self._execute("UPDATE {} SET used = ? WHERE key = ?", time.time_ns(), key)
            return value
        return None

    def _put(self, key: bytes, value: bytes) -> None:
        if len(value) > self._capacity:
            self._execute("DELETE FROM {} WHERE key = ?", key)
            return
        entry = key, value, _digest(key, value), time.time_ns()
        self._execute("INSERT OR REPLACE INTO {} VALUES (?, ?, ?, ?)", *entry)
        rows, _ = self._execute("SELECT sum(length(value)) FROM {}")
        excess = sum(size or 0 for (size,) in rows) - self._capacity
        while excess > 0:
            ((oldest, size),), _ = self._execute(
                "SELECT key, length(value) FROM {} ORDER BY used LIMIT 1"
            )
            self._execute("DELETE FROM {} WHERE key = ?", oldest)
            excess -= size

    def _execute(self, statement: str, *values: bytes | int) -> tuple[list[tuple[Any, ...]], int]:
        """Run a statement, with the table for `{}`.

        Returns the rows and the number changed.
        """
        if self._database is None:
            return [], 0
        cursor = self._database.execute(statement.replace("{}", self._table), values)
        return cursor.fetchall(), cursor.rowcount


def _digest(key: bytes, value: bytes) -> bytes:
    return blake2b(value, key=key[:64], digest_size=16).digest()
