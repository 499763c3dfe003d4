"""One tool call, read tag by tag and told as it comes.

    <tool_call>NAME<arg_key>K</arg_key><arg_value>V</arg_value>…</tool_call>

The model writes a string raw and any other value as JSON. What a call becomes never depends on
how its text is cut into pieces. What is not in this form is read like this:

- Whitespace around names and keys, and any text between tags, means nothing.
- Inside a value every tag but `</arg_value>` is text. `</arg_value>` is text too if text follows
  it; so is `</tool_call>` unless the call ends there.
- A missing `</arg_key>` or `</tool_call>` is supplied when what follows leaves no doubt. A value
  that was not finished is never finished for the model: the arguments stay open, and no JSON.
- A key without a value, a value without a key, an empty key, and a key given before are left out,
  as is a call without a name.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from enum import Enum, auto

from glmd.chat.events import Event, ToolCallDelta, ToolCallStart
from glmd.chat.special_tokens import SpecialTokens
from glmd.chat.tool_args import FREE, JSON_SPACE, ArgType, dump
from glmd.chat.tools import Tool

NUMBER = frozenset("+-.eE0123456789" + JSON_SPACE)
LITERALS = {"n": "null", "t": "true", "f": "false"}


class ValueWriter:
    """JSON of one value, in pieces: a string as it arrives, anything else once it is whole."""

    def __init__(self, kind: ArgType) -> None:
        self._kind = kind
        self._streaming = kind.only_string
        self._opened = False
        self._first = ""
        """First character that is not whitespace, while it is open what the value is."""
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        """JSON that is certain by now."""
        if self._streaming:
            return self._string(text)
        self._held.append(text)
        if not self._plainly_string(text):
            return ""
        self._streaming = True
        return self._string("".join(self._held))

    def close(self) -> str:
        """The rest of the JSON."""
        if self._streaming:
            return self._string("") + '"'
        return self._kind.json_of("".join(self._held))

    def _string(self, text: str) -> str:
        escaped = dump(text)[1:-1]
        if self._opened:
            return escaped
        self._opened = True
        return '"' + escaped

    def _plainly_string(self, text: str) -> bool:
        """Whether the value cannot be JSON of any allowed type, now that `text` follows."""
        if self._kind.starts is None:
            return False
        if not self._first:
            text = text.lstrip(JSON_SPACE)
            if not text:
                return False
            self._first = text[0]
        if self._first not in self._kind.starts:
            return True
        literal = LITERALS.get(self._first)
        if literal is not None:
            return not literal.startswith("".join(self._held).strip(JSON_SPACE))
        return self._first in NUMBER and not NUMBER.issuperset(text)


class _At(Enum):
    NAME = auto()
    KEY = auto()
    BETWEEN = auto()
    VALUE = auto()
    IGNORED_VALUE = auto()
    END = auto()


class ToolCallParser:
    """Reads from after `<tool_call>` to `</tool_call>`.

    Attributes:
        told: the call's start was given out.
        ended: nothing more belongs to the call. If it was told, its arguments are a JSON object.
        lacks_end: `</tool_call>` was supplied for the model.
    """

    def __init__(self, index: int, tools: Mapping[str, Tool], tags: SpecialTokens) -> None:
        """
        Args:
            index: of the call in its answer.
            tools: the known ones, by name.
        """
        self.told = False
        self.lacks_end = False
        self._index = index
        self._tools = tools
        self._tags = tags
        self._at = _At.NAME
        self._name = ""
        self._key = ""
        self._keys: set[str] = set()
        self._value: ValueWriter | None = None
        self._close: int | None = None
        """A tag that ends the value, unless text follows it."""
        self._held = ""
        """That tag's spelling and the whitespace after it."""

    @property
    def ended(self) -> bool:
        return self._at is _At.END

    @property
    def in_value(self) -> bool:
        """Whatever comes next, tag or not, may be text of a value."""
        return self._at is _At.VALUE and self._close is None

    def text(self, text: str) -> list[Event]:
        match self._at:
            case _At.NAME:
                self._name += text
            case _At.KEY:
                self._key += text
            case _At.VALUE:
                if self._close is None:
                    return self._value_text(text)
                self._held += text
                return [] if text.isspace() else self._release()
        return []

    def tag(self, tag: int, spelling: str) -> list[Event]:
        """A control token, and its spelling in case it is text here."""
        match self._at:
            case _At.NAME:
                return self._tag_in_name(tag)
            case _At.KEY | _At.BETWEEN:
                return self._tag_outside(tag)
            case _At.VALUE:
                return self._tag_in_value(tag, spelling)
            case _At.IGNORED_VALUE if tag == self._tags.end_arg_value:
                self._at = _At.BETWEEN
            case _At.IGNORED_VALUE if tag == self._tags.end_tool_call:
                return self._end()
        return []

    def stop(self) -> list[Event]:
        """The model ended its answer here, or began another call."""
        events: list[Event] = []
        if self._at is _At.NAME:
            events = self._tell()
        elif self._close is not None:
            self.lacks_end = self._close == self._tags.end_arg_value
            return [*self._value_end(), *self._end()]
        elif self._at is _At.VALUE or self._key:
            return []
        self.lacks_end = True
        return events + self._end()

    def cut(self) -> list[Event]:
        """The answer was cut off here: the call is ended only if nothing can be missing."""
        events: list[Event] = []
        if self._close == self._tags.end_arg_value:
            events = self._value_end()
        declared = self._declared
        if self._at is _At.BETWEEN and declared and self._keys.issuperset(declared):
            self.lacks_end = True
            events += self._end()
        return events

    def _tag_in_name(self, tag: int) -> list[Event]:
        tags = self._tags
        if tag not in (tags.arg_key, tags.arg_value, tags.end_tool_call):
            return []
        events = self._tell()
        self._at = _At.BETWEEN
        return events + self._tag_outside(tag)

    def _tag_outside(self, tag: int) -> list[Event]:
        tags = self._tags
        if tag == tags.arg_key:
            self._key = ""
            self._at = _At.KEY
        elif tag == tags.end_arg_key:
            self._at = _At.BETWEEN
        elif tag == tags.arg_value:
            return self._value_start()
        elif tag == tags.end_tool_call:
            return self._end()
        return []

    def _tag_in_value(self, tag: int, spelling: str) -> list[Event]:
        tags = self._tags
        events: list[Event] = []
        if self._close is not None:
            after_value = (tags.arg_key, tags.end_tool_call)
            if self._close == tags.end_arg_value and tag in after_value:
                events = self._value_end()
                return events + self._tag_outside(tag)
            events = self._release()
        if tag in (tags.end_arg_value, tags.end_tool_call):
            self._close = tag
            self._held = spelling
            return events
        return events + self._value_text(spelling)

    @property
    def _declared(self) -> Mapping[str, ArgType]:
        """The types of the arguments, if the tool is known."""
        tool = self._tools.get(self._name)
        return {} if tool is None else tool.arguments

    def _tell(self) -> list[Event]:
        self._name = self._name.strip()
        if not self._name:
            return []
        self.told = True
        return [ToolCallStart(self._index, f"call_{secrets.token_hex(12)}", self._name)]

    def _value_start(self) -> list[Event]:
        key = self._key.strip()
        self._key = ""
        if not key or key in self._keys:
            self._at = _At.IGNORED_VALUE
            return []
        self._at = _At.VALUE
        self._value = ValueWriter(self._declared.get(key, FREE))
        opening = ", " if self._keys else "{"
        self._keys.add(key)
        return self._delta(f"{opening}{dump(key)}: ")

    def _value_text(self, text: str) -> list[Event]:
        assert self._value is not None
        return self._delta(self._value.feed(text))

    def _value_end(self) -> list[Event]:
        assert self._value is not None
        self._close = None
        self._at = _At.BETWEEN
        return self._delta(self._value.close())

    def _release(self) -> list[Event]:
        """What seemed to end the value was part of it."""
        self._close = None
        return self._value_text(self._held)

    def _end(self) -> list[Event]:
        self._at = _At.END
        return self._delta("}" if self._keys else "{}")

    def _delta(self, arguments: str) -> list[Event]:
        return [ToolCallDelta(self._index, arguments)] if arguments and self.told else []
