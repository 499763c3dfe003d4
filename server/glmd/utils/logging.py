"""Log lines, in both processes alike: for people on a terminal, as JSON for everybody else.

A line may carry fields, `extra={"fields": {...}}`: keys of the JSON object. As text it is its
message alone, which says the same.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the HTTP request that is being served; lines that are written meanwhile carry it."""


class JsonFormatter(logging.Formatter):
    """One JSON object to a line."""

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
    """Time, level, logger, message, and the request that it is about, if the message does not say.

    Control characters are shown as escapes, lest what a client sends looks like a line of its own.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        line = escape_controls(super().formatMessage(record))
        id = request_id.get()
        return line if id is None or id in line else f"{line} [{id}]"


def escape_controls(text: str) -> str:
    """`text` on one line, whatever is in it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def for_people(line: str) -> str:
    """A line of a log as text, if it is one of ours in JSON; else as it is.

    What a journal puts before it goes, because it says the same.
    """
    try:
        fields = json.loads(line[line.index("{") :])
        words = [fields[name] for name in ("time", "level", "logger", "message")]
    except (ValueError, KeyError, TypeError):
        return line
    time, level, logger, message = map(str, words)
    moment = datetime.fromisoformat(time).astimezone().isoformat(" ", "milliseconds")
    text = escape_controls(f"{moment[:23]} {level} {logger}: {message}")
    id = str(fields.get("request_id", ""))
    if id not in text:
        text += f" [{id}]"
    return "\n".join([text, *str(fields.get("exception", "")).splitlines()])


def choose_format(setting: Literal["auto", "text", "json"], stream: TextIO) -> LogFormat:
    """The form that a setting means for a stream: text on a terminal, else JSON."""
    if setting == "auto":
        return "text" if stream.isatty() else "json"
    return setting


def configure(level: str, form: LogFormat) -> None:
    """Write log lines of ours at `level`, of others from WARNING on, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if form == "text" else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("glmd").setLevel(level)
