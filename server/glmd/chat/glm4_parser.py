"""Where each token of an answer belongs: reasoning, content, or a call.

Tags are known by their ids, so text that merely spells one stays text. Where a tag has no
meaning it is left out, never shown: a second `</think>`, a stray `<arg_value>`, a role tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from glmd.chat.events import Event
from glmd.chat.special_tokens import SpecialTokens
from glmd.chat.tool_call_parser import ToolCallParser
from glmd.chat.tools import Tool

Section = Literal["reasoning", "content", "call"]


class Glm4OutputParser:
    """Follows the tags. Text belongs to the `section` they lead to; that of calls is read here.

    A call may stand anywhere, also inside the reasoning; after it, the section around it goes on.

    Attributes:
        section: where the next token belongs.
        calls: how many calls were told of.
        opened_calls: how many calls were begun.
        dropped_calls: a call was left out: it has no name, or no calls are allowed.
        broken_calls: a call's arguments stayed open.
    """

    def __init__(self, tags: SpecialTokens, tools: Sequence[Tool], *, in_reasoning: bool) -> None:
        """
        Args:
            tools: those that may be called; without any, calls are left out.
            in_reasoning: whether the prompt ends inside `<think>`.
        """
        self.calls = 0
        self.opened_calls = 0
        self.dropped_calls = False
        self.broken_calls = False
        self._tags = tags
        self._tools = {tool.name: tool for tool in tools}
        self._in_reasoning = in_reasoning
        self._call: ToolCallParser | None = None
        self._lacks_end = False

    @property
    def section(self) -> Section:
        if self._call is not None:
            return "call"
        return "reasoning" if self._in_reasoning else "content"

    def call_text(self, text: str) -> list[Event]:
        """Text that is not empty, inside a call."""
        assert self._call is not None
        return self._allowed(self._call.text(text))

    def tag(self, tag: int, spelling: str) -> list[Event]:
        """A control token, and its spelling in case it is text where it stands."""
        call = self._call
        if tag == self._tags.tool_call and (call is None or not call.in_value):
            events = [] if call is None else call.stop()
            self._leave()
            self._call = ToolCallParser(self.calls, self._tools, self._tags)
            self.opened_calls += 1
            return self._allowed(events)
        if call is not None:
            events = call.tag(tag, spelling)
            if call.ended:
                self._leave()
            return self._allowed(events)
        if tag in (self._tags.think, self._tags.end_think):
            self._in_reasoning = tag == self._tags.think
        return []

    def end(self, *, cut: bool) -> list[Event]:
        """No more follows: the model ended its answer, or it was cut off."""
        call = self._call
        if call is None:
            return []
        events = call.cut() if cut else call.stop()
        self._lacks_end = call.lacks_end
        self._leave()
        return self._allowed(events)

    def closing(self) -> tuple[int, ...]:
        """After `end`: the tags that the generated ids lack to be a turn like any other."""
        if self._lacks_end:
            return (self._tags.end_tool_call,)
        return (self._tags.end_think,) if self._in_reasoning and not self.calls else ()

    def _leave(self) -> None:
        call = self._call
        self._call = None
        if call is None:
            return
        if not call.told or not self._tools:
            self.dropped_calls = True
            return
        self.calls += 1
        self.broken_calls |= not call.ended

    def _allowed(self, events: list[Event]) -> list[Event]:
        return events if self._tools else []
