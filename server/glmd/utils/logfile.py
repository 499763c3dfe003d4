"""A log in a file that is renamed while it is written to, by us or by newsyslog.

The file stands behind the process's stdout and stderr, so that all of it lands there: log lines,
the engine's, and the last words of native code.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

log = logging.getLogger("glmd")

INTERVAL = 5.0
"""Seconds between two looks at whether the file is still where it was."""

LOG_BYTES = 10_000_000
"""A log beyond this is put aside as `NAME.1`, and a new one begun."""

STREAMS = (1, 2)


class LogFile:
    """The file at `path` behind stdout and stderr.

    Args:
        path: of the file; its folder must be there.
        limit: bytes beyond which it is put aside; None: another process sees to that.
    """

    def __init__(self, path: Path, limit: int | None = LOG_BYTES) -> None:
        self.path = path
        self._limit = limit
        self._failed = False

    def open(self) -> None:
        """Write there from now on.

        Raises:
            OSError: it cannot be opened.
        """
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            for stream in STREAMS:
                os.dup2(handle, stream)
        finally:
            os.close(handle)

    def refresh(self) -> None:
        """Put the file aside if it is too large, and begin a new one if it is gone.

        What cannot be done is tried again; the first failure in a row is logged.
        """
        try:
            if self._limit is not None and os.fstat(STREAMS[0]).st_size > self._limit:
                self.path.replace(self.path.with_name(self.path.name + ".1"))
            if not self._is_open():
                self.open()
        except OSError as error:
            if not self._failed:
                log.error("%s cannot be opened anew: %s.", self.path, error.strerror)
            self._failed = True
        else:
            self._failed = False

    def _is_open(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(STREAMS[0]))
        except FileNotFoundError:
            return False

    def follow(self) -> None:
        """Refresh it every few seconds, in a thread that ends with the process."""
        threading.Thread(target=self._follow, name="log file", daemon=True).start()

    def _follow(self) -> None:
        pause = threading.Event()
        while not pause.wait(INTERVAL):
            self.refresh()
