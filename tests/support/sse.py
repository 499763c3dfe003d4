"""Server-sent events, read strictly (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LINE = re.compile(r"(event|data|id|retry|): ([^\r\0]*)")
"""A field or, with no name, a comment. The grammar has looser forms, which glmd never writes."""


@dataclass
class Frame:
    """What stands between two blank lines: an event, or comments alone."""

    event: str | None = None
    data: str | None = None
    id: str | None = None
    retry: int | None = None
    comments: list[str] = field(default_factory=list)


@dataclass
class Events:
    """What a whole stream held.

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

    Lines end in LF alone, each frame in a blank line, the last one too, and no frame is empty. A
    browser would drop an event without data, so it is taken for a mistake.
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
    """Parse a stream, of which every byte must be as OpenAI's clients expect it."""
    events = Events()
    for frame in frames(body):
        assert not events.done, f"{frame} after [DONE]"
        events.comments += frame.comments
        if frame.data is None:
            continue
        assert frame == Frame(data=frame.data), frame
        if frame.data == "[DONE]":
            events.done = True
        else:
            events.chunks.append(json.loads(frame.data))
    return events


def read_named(body: bytes) -> list[dict[str, Any]]:
    """The JSON of each event, of a stream whose events are named as their type is."""
    events = []
    for frame in frames(body):
        assert frame.data is not None, frame
        event: dict[str, Any] = json.loads(frame.data)
        assert frame == Frame(event=event["type"], data=frame.data), frame
        events.append(event)
    return events
