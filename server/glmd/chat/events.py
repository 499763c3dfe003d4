"""What a model's answer consists of, as the chat layer hands it to the APIs.

An answer is a sequence of these events; a non-streamed response is their fold, a streamed one
their rendering, so both always say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glmd.ipc import TokenLogprobs

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One generated token with its log-probabilities; only made for requests that ask."""

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
    """A call begins: its name is complete, its arguments follow as deltas."""

    index: int
    """0 for the answer's first call."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call's JSON arguments; the pieces of one call concatenate to one object."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer."""

    reason: FinishReason
    stop_sequence: str | None = None
    """The stop string that matched, if one did."""


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallDelta | Finished
