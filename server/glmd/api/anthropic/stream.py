"""From events to Anthropic's messages: stream events, or the message that they add up to."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from hashlib import blake2b

import pydantic_core

from glmd.api.anthropic import errors
from glmd.api.anthropic.protocol import (
    BlockDelta,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    SignatureDelta,
    Stop,
    StopReason,
    StreamEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from glmd.api.error_info import ErrorInfo
from glmd.api.generation import Generation
from glmd.api.sse import frame
from glmd.chat.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
)

STOP_REASONS: dict[str, StopReason] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}


class MessageBuilder:
    """Tells an answer's events, and adds them to the message (a `ResponseBuilder`).

    What it tells holds parts of the message as they are at that moment.

    Attributes:
        message: what there is of it.
    """

    def __init__(
        self, id: str, model: str, generation: Generation, *, max_tokens: int, omit_thinking: bool
    ) -> None:
        """
        Args:
            max_tokens: the request's.
            omit_thinking: thinking blocks are to come without thoughts.
        """
        self._generation = generation
        self._max_tokens = max_tokens
        self._omit_thinking = omit_thinking
        self._thinking = ""
        """The open block's, shown or not."""
        self._input = ""
        """JSON of the open block's input."""
        self._is_open = False
        self.message = Message(
            id=id, model=model, content=[], stop_reason=None, stop_sequence=None, usage=self._usage
        )

    @property
    def _usage(self) -> MessageUsage:
        return MessageUsage.of(self._generation.usage)

    def start(self) -> Iterator[StreamEvent]:
        """The first events; the usage is what is known by now, that of the last event is final."""
        self.message.usage = self._usage
        yield MessageStart(message=self.message)
        yield self.keep_alive()

    def keep_alive(self) -> StreamEvent:
        return Ping()

    def add(self, event: Event) -> Iterator[StreamEvent]:
        match event:
            case ReasoningDelta(text):
                yield from self._think(text)
            case ContentDelta(text) if text:
                if not isinstance(self._open_block, TextBlock):
                    yield from self._open(TextBlock(text=""))
                yield self._delta(TextDelta(text=text))
            case ToolCallStart(_, id, name):
                yield from self._open(ToolUseBlock(id=id, name=name, input={}))
            case ToolCallDelta(_, arguments):
                yield self._delta(InputJsonDelta(partial_json=arguments))
            case Finished(reason, stop_sequence):
                yield from self._close()
                self.message.stop_reason = self._stop_reason(reason, stop_sequence)
                self.message.stop_sequence = stop_sequence

    def end(self) -> Iterator[StreamEvent]:
        """The events after the last block."""
        self.message.usage = self._usage
        assert self.message.stop_reason is not None, "a generation ends with Finished"
        stop = Stop(stop_reason=self.message.stop_reason, stop_sequence=self.message.stop_sequence)
        yield MessageDelta(delta=stop, usage=self.message.usage)
        yield MessageStop()

    @property
    def _open_block(self) -> TextBlock | ThinkingBlock | ToolUseBlock | None:
        return self.message.content[-1] if self._is_open else None

    def _think(self, text: str) -> Iterator[StreamEvent]:
        if not isinstance(self._open_block, ThinkingBlock):
            yield from self._open(ThinkingBlock(thinking="", signature=""))
        self._thinking += text
        if text and not self._omit_thinking:
            yield self._delta(ThinkingDelta(thinking=text))

    def _open(self, block: TextBlock | ThinkingBlock | ToolUseBlock) -> Iterator[StreamEvent]:
        yield from self._close()
        self._is_open = True
        self._thinking = self._input = ""
        self.message.content.append(block)
        yield ContentBlockStart(index=len(self.message.content) - 1, content_block=block)

    def _delta(self, delta: BlockDelta) -> StreamEvent:
        match self._open_block, delta:
            case TextBlock() as block, TextDelta(text=text):
                block.text += text
            case ThinkingBlock() as block, ThinkingDelta(thinking=thinking):
                block.thinking += thinking
            case ThinkingBlock() as block, SignatureDelta(signature=signature):
                block.signature = signature
            case ToolUseBlock(), InputJsonDelta(partial_json=partial_json):
                self._input += partial_json
            case block, _:
                raise TypeError(f"{delta} does not belong into {block}")
        return ContentBlockDelta(index=len(self.message.content) - 1, delta=delta)

    def _close(self) -> Iterator[StreamEvent]:
        block = self._open_block
        if block is None:
            return
        if isinstance(block, ThinkingBlock):
            yield self._delta(SignatureDelta(signature=sign(self._thinking)))
        if isinstance(block, ToolUseBlock):
            # Of arguments that were cut off, those that are whole. Clients do the same.
            block.input = pydantic_core.from_json(self._input or "{}", allow_partial=True)
        self._is_open = False
        yield ContentBlockStop(index=len(self.message.content) - 1)

    def _stop_reason(self, reason: str, stop_sequence: str | None) -> StopReason:
        if stop_sequence is not None:
            return "stop_sequence"
        if reason == "length" and self._generation.usage.completion_tokens < self._max_tokens:
            return "model_context_window_exceeded"
        return STOP_REASONS[reason]


def error_frame(problem: ErrorInfo, request_id: str) -> bytes:
    """An error after the first byte."""
    body = json.dumps(errors.body(problem, request_id), ensure_ascii=False)
    return frame(body, "error")


def sign(thinking: str) -> str:
    """What stands for a signature: clients keep only thinking blocks that have one."""
    digest = blake2b(thinking.encode("utf-8", "surrogatepass"), digest_size=24).digest()
    return base64.b64encode(digest).decode()
