"""Parse GLM-4.7's output format: reasoning, content and tool calls.

    REASONING</think>CONTENT
    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call>

Tags are recognized by token id, so text that spells a tag stays text. A tag without a meaning at
its place is dropped: a second `</think>`, a stray `<arg_value>`, a role token.

Strings are raw, all other values are JSON. The result never depends on how the text is split into
tokens. Malformed calls are read as follows:

- Whitespace around names and keys, and any text between tags, is ignored.
- Inside a value every tag but `</arg_value>` is text. `</arg_value>` is text if text follows, and
  `</tool_call>` is text unless the call ends there.
- A missing `</arg_key>` or `</tool_call>` is added if only one reading is possible. An incomplete
  value is never completed: the arguments stay open, and are not JSON.
- A key without a value, a value without a key, an empty key, and a repeated key are dropped, and so
  is a call without a name.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Literal

from glmd.chat.tokenizer import SpecialTokens
from glmd.chat.tool_args import FREE, ArgType, ArgTypeReader, ValueWriter, dump
from glmd.chat.types import Event, Tool, ToolCallDelta, ToolCallStart

Section = Literal["reasoning", "content", "call"]


class Glm4OutputParser:
    """Assigns each token to a section, and parses the sections that are calls.

    A call can be anywhere, also inside the reasoning; after it the section around it continues.

    Attributes:
        num_calls: number of calls that were started and ended.
        num_opened_calls: number of `<tool_call>` tags read.
        has_dropped_call: a call was dropped: it has no name, or no calls are allowed.
        has_incomplete_call: the arguments of a call stayed open.
    """

    def __init__(
        self, special_tokens: SpecialTokens, tools: Sequence[Tool], *, in_reasoning: bool
    ) -> None:
        """
        Args:
            tools: the tools that may be called; without any, calls are dropped.
            in_reasoning: the prompt ends inside `<think>`.
        """
        self.num_calls = 0
        self.num_opened_calls = 0
        self.has_dropped_call = False
        self.has_incomplete_call = False
        self._special_tokens = special_tokens
        self._tools = {tool.name: tool for tool in tools}
        self._arg_types: dict[str, Mapping[str, ArgType]] = {}
        self._in_reasoning = in_reasoning
        self._call: ToolCallParser | None = None
        self._lacks_end = False

    @property
    def section(self) -> Section:
        """The section of the next token."""
        if self._call is not None:
            return "call"
        return "reasoning" if self._in_reasoning else "content"

    def call_text(self, text: str) -> list[Event]:
        """Take text inside a call; not empty."""
        assert self._call is not None
        return self._allowed(self._call.text(text))

    def tag(self, tag: int, spelling: str) -> list[Event]:
        """Take a control token, and its spelling in case the token is text at this place."""
        call = self._call
        if tag == self._special_tokens.tool_call and (call is None or not call.in_value):
            events = [] if call is None else call.end()
            self._leave_call()
            self._call = ToolCallParser(self.num_calls, self._argument_types, self._special_tokens)
            self.num_opened_calls += 1
            return self._allowed(events)
        if call is not None:
            events = call.tag(tag, spelling)
            if call.ended:
                self._leave_call()
            return self._allowed(events)
        if tag in (self._special_tokens.think, self._special_tokens.end_think):
            self._in_reasoning = tag == self._special_tokens.think
        return []

    def end(self, *, cut: bool) -> list[Event]:
        """End the output.

        Args:
            cut: the output was cut off, rather than ended by the model.
        """
        call = self._call
        if call is None:
            return []
        events = call.cut() if cut else call.end()
        self._lacks_end = call.lacks_end
        self._leave_call()
        return self._allowed(events)

    def closing(self) -> tuple[int, ...]:
        """After `end`: the tags that the generated ids lack to be a complete turn."""
        if self._lacks_end:
            return (self._special_tokens.end_tool_call,)
        if self._in_reasoning and not self.num_calls:
            return (self._special_tokens.end_think,)
        return ()

    def _argument_types(self, name: str) -> Mapping[str, ArgType]:
        """Types of a tool's declared arguments; {} for an unknown tool."""
        if name not in self._tools:
            return {}
        if name not in self._arg_types:
            self._arg_types[name] = ArgTypeReader(self._tools[name].parameters).arguments()
        return self._arg_types[name]

    def _leave_call(self) -> None:
        call = self._call
        self._call = None
        if call is None:
            return
        if not call.started or not self._tools:
            self.has_dropped_call = True
            return
        self.num_calls += 1
        self.has_incomplete_call |= not call.ended

    def _allowed(self, events: list[Event]) -> list[Event]:
        return events if self._tools else []


class _At(Enum):
    """Position inside a call."""

    NAME = auto()
    KEY = auto()
    BETWEEN = auto()
    VALUE = auto()
    DROPPED_VALUE = auto()
    END = auto()


class ToolCallParser:
    """Parses one call, from after `<tool_call>` to `</tool_call>`.

    Attributes:
        started: the `ToolCallStart` event was returned.
        lacks_end: `</tool_call>` is missing, and was added.
    """

    def __init__(
        self,
        index: int,
        argument_types: Callable[[str], Mapping[str, ArgType]],
        special_tokens: SpecialTokens,
    ) -> None:
        """
        Args:
            index: of the call in its answer.
            argument_types: types of the declared arguments, by the tool's name.
        """
        self.started = False
        self.lacks_end = False
        self._index = index
        self._argument_types = argument_types
        self._special_tokens = special_tokens
        self._at = _At.NAME
        self._name = ""
        self._key = ""
        self._keys: set[str] = set()
        self._declared: Mapping[str, ArgType] = {}
        self._value: ValueWriter | None = None
        self._end_tag: int | None = None
        """The tag that ends the value, unless text follows."""
        self._held = ""
        """Spelling of `_end_tag`, and the whitespace after it."""

    @property
    def ended(self) -> bool:
        """The call is complete; if it was started, its arguments are a JSON object."""
        return self._at is _At.END

    @property
    def in_value(self) -> bool:
        """Any next token, tag or not, may be text of a value."""
        return self._at is _At.VALUE and self._end_tag is None

    def text(self, text: str) -> list[Event]:
        match self._at:
            case _At.NAME:
                self._name += text
            case _At.KEY:
                self._key += text
            case _At.VALUE:
                if self._end_tag is None:
                    return self._value_text(text)
                self._held += text
                return [] if text.isspace() else self._continue_value()
        return []

    def tag(self, tag: int, spelling: str) -> list[Event]:
        """Take a control token, and its spelling in case the token is text at this place."""
        tokens = self._special_tokens
        match self._at:
            case _At.NAME:
                if tag not in (tokens.arg_key, tokens.arg_value, tokens.end_tool_call):
                    return []
                events = self._start()
                self._at = _At.BETWEEN
                return events + self._tag_outside(tag)
            case _At.KEY | _At.BETWEEN:
                return self._tag_outside(tag)
            case _At.VALUE:
                return self._tag_in_value(tag, spelling)
            case _At.DROPPED_VALUE if tag == tokens.end_arg_value:
                self._at = _At.BETWEEN
            case _At.DROPPED_VALUE if tag == tokens.end_tool_call:
                return self._close()
        return []

    def end(self) -> list[Event]:
        """The model ended its answer, or started another call, inside this call."""
        events: list[Event] = []
        if self._at is _At.NAME:
            events = self._start()
        elif self._end_tag is not None:
            self.lacks_end = self._end_tag == self._special_tokens.end_arg_value
            return [*self._value_end(), *self._close()]
        elif self._at is _At.VALUE or self._key:
            return []
        self.lacks_end = True
        return events + self._close()

    def cut(self) -> list[Event]:
        """The answer was cut off here; end the call only if no argument is missing."""
        events: list[Event] = []
        if self._end_tag == self._special_tokens.end_arg_value:
            events = self._value_end()
        if self._at is _At.BETWEEN and self._declared and self._keys.issuperset(self._declared):
            self.lacks_end = True
            events += self._close()
        return events

    def _tag_outside(self, tag: int) -> list[Event]:
        tokens = self._special_tokens
        if tag == tokens.arg_key:
            self._key = ""
            self._at = _At.KEY
        elif tag == tokens.end_arg_key:
            self._at = _At.BETWEEN
        elif tag == tokens.arg_value:
            return self._value_start()
        elif tag == tokens.end_tool_call:
            return self._close()
        return []

    def _tag_in_value(self, tag: int, spelling: str) -> list[Event]:
        tokens = self._special_tokens
        events: list[Event] = []
        if self._end_tag is not None:
            after_value = (tokens.arg_key, tokens.end_tool_call)
            if self._end_tag == tokens.end_arg_value and tag in after_value:
                events = self._value_end()
                return events + self._tag_outside(tag)
            events = self._continue_value()
        if tag in (tokens.end_arg_value, tokens.end_tool_call):
            self._end_tag = tag
            self._held = spelling
            return events
        return events + self._value_text(spelling)

    def _start(self) -> list[Event]:
        """The name is complete."""
        self._name = self._name.strip()
        if not self._name:
            return []
        self.started = True
        self._declared = self._argument_types(self._name)
        return [ToolCallStart(self._index, f"call_{secrets.token_hex(12)}", self._name)]

    def _value_start(self) -> list[Event]:
        key = self._key.strip()
        self._key = ""
        if not key or key in self._keys:
            self._at = _At.DROPPED_VALUE
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
        self._end_tag = None
        self._at = _At.BETWEEN
        return self._delta(self._value.close())

    def _continue_value(self) -> list[Event]:
        """The supposed end of the value is part of it."""
        self._end_tag = None
        return self._value_text(self._held)

    def _close(self) -> list[Event]:
        self._at = _At.END
        return self._delta("}" if self._keys else "{}")

    def _delta(self, arguments: str) -> list[Event]:
        return [ToolCallDelta(self._index, arguments)] if arguments and self.started else []
