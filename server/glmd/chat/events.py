"""Events of a model's answer, which each API renders in its own format.

A streamed response renders the events; a non-streamed response is their fold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glmd.ipc import TokenLogprobs

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A generated token with its log-probabilities, for requests that ask for them."""

    id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str
    tokens: list[TokenInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str
    tokens: list[TokenInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The start of a tool call. Its arguments follow as `ToolCallDelta`s.

    Attributes:
        index: 0 for the answer's first call.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call's JSON arguments. The pieces of a call join to one object."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer.

    Attributes:
        stop_sequence: the stop string that matched, or None.
    """

    reason: FinishReason
    stop_sequence: str | None = None


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallDelta | Finished
