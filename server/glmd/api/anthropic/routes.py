"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, streamed or whole."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from hashlib import blake2b

import pydantic_core
from fastapi import APIRouter, Request, Response

from glmd.api.anthropic.input import read_tools
from glmd.api.anthropic.protocol import (
    AnthropicMessage,
    AnyMessageEvent,
    BlockDelta,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    InputJsonDelta,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    PingEvent,
    SignatureDelta,
    StopDetails,
    StopReason,
    TextBlock,
    TextBlockDelta,
    ThinkingBlock,
    ThinkingDelta,
    TokenCount,
    ToolUseBlock,
    error_body,
)
from glmd.api.context import AccessDep, ContextDep
from glmd.api.errors import ErrorInfo
from glmd.api.generation_request import omitted_header
from glmd.api.request_body import JsonRoute
from glmd.api.serving import count_prompt_tokens, serve
from glmd.api.state import StateDep
from glmd.api.streaming import Generation, StreamEvent, sse_frame
from glmd.chat.types import (
    ContentDelta,
    Conversation,
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
    """Events of a message, and the message that they add up to.

    Args:
        max_tokens: The request's limit.
        omit_thinking: Leave thinking blocks empty.
        request_id: ID of the HTTP request, for errors.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        model: str,
        max_tokens: int,
        omit_thinking: bool,
        request_id: str,
    ) -> None:
        self._generation = generation
        self._max_tokens = max_tokens
        self._omit_thinking = omit_thinking
        self._request_id = request_id
        self._block: TextBlock | ThinkingBlock | ToolUseBlock | None = None
        """The open block, which is the last of the content."""
        self._thinking = ""
        """Thinking of the open block, omitted or not."""
        self._input = ""
        """JSON of the open block's input."""
        self._message = AnthropicMessage(
            id=generation.request.id,
            model=model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=self._usage,
        )

    def start(self) -> Iterator[bytes]:
        self._message.usage = self._usage
        yield write(MessageStart(message=self._message))
        yield self.heartbeat()

    def heartbeat(self) -> bytes:
        return write(PingEvent())

    def add(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        match event:
            case ReasoningDelta(text):
                if not isinstance(self._block, ThinkingBlock):
                    yield from self._open(ThinkingBlock(thinking="", signature=""))
                self._thinking += text
                if text and not self._omit_thinking:
                    yield self._delta(ThinkingDelta(thinking=text))
            case ContentDelta(text) if text:
                if not isinstance(self._block, TextBlock):
                    yield from self._open(TextBlock(text=""))
                yield self._delta(TextBlockDelta(text=text))
            case ToolCallStart(_, id, name):
                yield from self._open(ToolUseBlock(id=id, name=name, input={}))
            case ToolCallDelta(_, arguments):
                self._input += arguments
                yield self._delta(InputJsonDelta(partial_json=arguments))
            case Finished(reason, stop_sequence):
                yield from self._close()
                self._message.stop_reason = self._stop_reason(reason, stop_sequence)
                self._message.stop_sequence = stop_sequence

    def end(self) -> Iterator[bytes]:
        message = self._message
        message.usage = self._usage
        assert message.stop_reason is not None, "an answer ends with Finished"
        stop = StopDetails(stop_reason=message.stop_reason, stop_sequence=message.stop_sequence)
        yield write(MessageDelta(delta=stop, usage=message.usage))
        yield write(MessageStop())

    def fail(self, error: ErrorInfo) -> bytes:
        body = error_body(error, self._request_id)
        return sse_frame(json.dumps(body, ensure_ascii=False), "error")

    def to_json(self) -> str:
        return self._message.model_dump_json()

    @property
    def _usage(self) -> MessageUsage:
        return MessageUsage.of(self._generation.usage)

    @property
    def _index(self) -> int:
        return len(self._message.content) - 1

    def _open(self, block: TextBlock | ThinkingBlock | ToolUseBlock) -> Iterator[bytes]:
        yield from self._close()
        self._block = block
        self._thinking = self._input = ""
        self._message.content.append(block)
        yield write(ContentBlockStart(index=self._index, content_block=block))

    def _delta(self, delta: BlockDelta) -> bytes:
        """Add a delta to the open block."""
        match self._block, delta:
            case TextBlock() as block, TextBlockDelta(text=text):
                block.text += text
            case ThinkingBlock() as block, ThinkingDelta(thinking=thinking):
                block.thinking += thinking
            case ThinkingBlock() as block, SignatureDelta(signature=signature):
                block.signature = signature
        return write(ContentBlockDelta(index=self._index, delta=delta))

    def _close(self) -> Iterator[bytes]:
        block = self._block
        if block is None:
            return
        if isinstance(block, ThinkingBlock):
            yield self._delta(SignatureDelta(signature=sign(self._thinking)))
        if isinstance(block, ToolUseBlock):
            # Incomplete arguments of a truncated answer are dropped, as Anthropic's clients do.
            block.input = pydantic_core.from_json(self._input or "{}", allow_partial=True)
        self._block = None
        yield write(ContentBlockStop(index=self._index))

    def _stop_reason(self, reason: str, stop_sequence: str | None) -> StopReason:
        if stop_sequence is not None:
            return "stop_sequence"
        if reason == "length" and self._generation.usage.completion_tokens < self._max_tokens:
            return "model_context_window_exceeded"
        return STOP_REASONS[reason]


def write(event: AnyMessageEvent) -> bytes:
    return sse_frame(event.model_dump_json(), event.type)


def sign(thinking: str) -> str:
    """Digest in place of a signature, without which clients drop thinking blocks."""
    digest = blake2b(thinking.encode("utf-8", "surrogatepass"), digest_size=24).digest()
    return base64.b64encode(digest).decode()


router = APIRouter(tags=["Anthropic"], route_class=JsonRoute)


@router.post("/v1/messages", response_model=AnthropicMessage)
async def create_message(
    body: MessagesRequest, http: Request, state: StateDep, context: ContextDep
) -> Response:
    """Continue a conversation, streamed or whole."""

    def build(generation: Generation) -> MessageBuilder:
        return MessageBuilder(
            generation,
            model=state.model.id,
            max_tokens=body.max_tokens,
            omit_thinking=body.thinking is not None and body.thinking.display == "omitted",
            request_id=http.state.request_id,
        )

    return await serve(http, state, context, body, body.to_generation_request, build)


@router.post("/v1/messages/count_tokens")
async def count_tokens(
    body: CountTokensRequest, http: Request, response: Response, state: StateDep, access: AccessDep
) -> TokenCount:
    """Count the tokens of a request's prompt."""
    defaults = state.defaults(body.model, body.profile)
    body.unknown_parameters()

    def read() -> Conversation:
        tools, _ = read_tools(body.tools)
        conversation = body.conversation(defaults, tools)
        response.headers.update(omitted_header(conversation))
        return conversation

    return TokenCount(input_tokens=await count_prompt_tokens(http, state, access, read))
