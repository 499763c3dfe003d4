"""Server-sent events, read strictly (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LINE = re.compile(r"(event|data|id|retry|): ([^\r\0]*)")
"""A field or, with no name, a comment; only the forms that glmd writes."""


@dataclass
class Frame:
    """Lines between two blank lines: an event, or comments alone."""

    event: str | None = None
    data: str | None = None
    id: str | None = None
    retry: int | None = None
    comments: list[str] = field(default_factory=list)


@dataclass
class Events:
    """Content of a whole stream.

    Attributes:
        chunks: the JSON of each event but the last.
        comments: the texts of comment lines.
        done: whether the last event was `[DONE]`.
    """

    chunks: list[dict[str, Any]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    done: bool = False


def frames(body: bytes) -> Iterator[Frame]:
    """The frames of a whole stream, each checked against the grammar.

    Lines end in LF, each frame ends in a blank line, and no frame is empty. An event without data,
    which a browser drops, is an error.
    """
    text = body.decode("utf-8")
    assert text.endswith("\n\n"), f"broken off: {text[-80:]!r}"
    assert not text.startswith("\ufeff")
    for block in text.removesuffix("\n\n").split("\n\n"):
        frame = Frame()
        for line in block.split("\n"):
            matched = LINE.fullmatch(line)
            assert matched, line
            name, value = matched.groups()
            if name == "":
                frame.comments.append(value)
                continue
            assert getattr(frame, name) is None, f"two of {name}: {block!r}"
            setattr(frame, name, int(value) if name == "retry" else value)
        assert frame.data is not None or frame == Frame(comments=frame.comments), block
        yield frame


def read(body: bytes) -> Events:
    """Parse a stream of chat or text completions strictly."""
    events = Events()
    for frame in frames(body):
        events.comments += frame.comments
        if frame.data is None:  # a keep-alive comment, which may also follow [DONE]
            continue
        assert not events.done, f"{frame} after [DONE]"
        assert frame == Frame(data=frame.data), frame
        if frame.data == "[DONE]":
            events.done = True
        else:
            events.chunks.append(json.loads(frame.data))
    return events


def read_named(body: bytes) -> list[dict[str, Any]]:
    """JSON of each event of a stream whose events are named by their type."""
    events = []
    for frame in frames(body):
        assert frame.data is not None, frame
        event: dict[str, Any] = json.loads(frame.data)
        assert frame == Frame(event=event["type"], data=frame.data), frame
        events.append(event)
    return events
