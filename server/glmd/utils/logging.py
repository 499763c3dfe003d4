"""Log formats and the log file, for both processes.

A record may carry `extra={"fields": {...}}`: additional keys of the JSON object, which the text
format omits because the message contains them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

log = logging.getLogger("glmd")

LogFormat = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the current HTTP request, added to its log lines. None: no request."""

LOG_FILE_INTERVAL = 5.0
"""Seconds between two checks of a log file."""

LOG_FILE_BYTES = 10_000_000
"""Size beyond which a log file is renamed to `NAME.1`."""

STREAMS = (1, 2)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (id := request_id.get()) is not None:
            line["request_id"] = id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Formats time, level, logger, message and, if missing in it, the request id.

    Control characters are escaped so that a client cannot forge log lines.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        line = escape_controls(super().formatMessage(record))
        id = request_id.get()
        return line if id is None or id in line else f"{line} [{id}]"


def escape_controls(text: str) -> str:
    """Escape all characters that are not printable, line breaks included."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def json_line_to_text(line: str) -> str:
    """Convert a line of `JsonFormatter` to text; return any other line unchanged.

    A prefix added by the system's journal is dropped.
    """
    try:
        fields = json.loads(line[line.index("{") :])
        time, level, logger, message = (
            str(fields[name]) for name in ("time", "level", "logger", "message")
        )
    except (ValueError, KeyError, TypeError):
        return line
    moment = datetime.fromisoformat(time).astimezone().isoformat(" ", "milliseconds")
    text = escape_controls(f"{moment[:23]} {level} {logger}: {message}")
    id = str(fields.get("request_id", ""))
    if id not in text:
        text += f" [{id}]"
    return "\n".join([text, *str(fields.get("exception", "")).splitlines()])


def choose_format(setting: Literal["auto", "text", "json"], stream: TextIO) -> LogFormat:
    """Resolve the format setting: "auto" is text on a terminal, else JSON."""
    if setting == "auto":
        return "text" if stream.isatty() else "json"
    return setting


def configure(level: str, log_format: LogFormat) -> None:
    """Log to stderr: glmd's loggers from `level` on, others from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if log_format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("glmd").setLevel(level)


class LogFile:
    """A log file behind stdout and stderr, also for output of native code.

    Args:
        path: path of the file, in an existing folder.
        limit: bytes beyond which the file is renamed to `NAME.1`. None: another process (the
            parent, newsyslog) renames the file.
    """

    def __init__(self, path: Path, limit: int | None = LOG_FILE_BYTES) -> None:
        self.path = path
        self._limit = limit
        self._failed = False

    def open(self) -> None:
        """Redirect stdout and stderr to the file.

        Raises:
            OSError: the file cannot be opened.
        """
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            for stream in STREAMS:
                os.dup2(handle, stream)
        finally:
            os.close(handle)

    def refresh(self) -> None:
        """Rename the file if it is too large; reopen the path if the file was renamed.

        After a failure the next call retries; only the first failure in a row is logged.
        """
        try:
            if self._limit is not None and os.fstat(STREAMS[0]).st_size > self._limit:
                self.path.replace(self.path.with_name(self.path.name + ".1"))
            if not self._is_open():
                self.open()
        except OSError as error:
            if not self._failed:
                log.error("Cannot reopen the log file: path=%s error=%s", self.path, error.strerror)
            self._failed = True
        else:
            self._failed = False

    def _is_open(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(STREAMS[0]))
        except FileNotFoundError:
            return False

    def follow(self) -> None:
        """Call `refresh` periodically in a daemon thread."""
        threading.Thread(target=self._follow, name="log file", daemon=True).start()

    def _follow(self) -> None:
        timer = threading.Event()
        while not timer.wait(LOG_FILE_INTERVAL):
            self.refresh()
