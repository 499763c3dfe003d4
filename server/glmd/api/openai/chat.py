"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response

from glmd.api.context import ContextDep
from glmd.api.errors import ErrorInfo
from glmd.api.openai.input import OpenAIFields
from glmd.api.openai.protocol import (
    CallDelta,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    CompletionUsage,
    FunctionCall,
    FunctionDelta,
    FunctionToolCall,
    PromptProgress,
    TokenLogprob,
)
from glmd.api.request_body import JsonRoute
from glmd.api.serving import serve
from glmd.api.state import AppState, StateDep
from glmd.api.streaming import GeneratedTokens, Generation, PrefillProgress, StreamEvent, sse_frame
from glmd.chat.types import (
    ContentDelta,
    Finished,
    FinishReason,
    ReasoningDelta,
    TokenInfo,
    ToolCallDelta,
    ToolCallStart,
)

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)

DONE = b"data: [DONE]\n\n"


@router.post("/api/v0/chat/completions", include_in_schema=False)  # LM Studio's path
@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    body: ChatCompletionRequest, http: Request, state: StateDep, context: ContextDep
) -> Response:
    """Continue a conversation, streamed or whole."""
    build = partial(ChatBuilder, body, state)
    return await serve(http, state, context, body, body.to_generation_request, build)


class OpenAIBuilder:
    """Common parts of chat and text completions: header, usage and token ids."""

    heartbeat: ClassVar = None

    def __init__(self, body: OpenAIFields, state: AppState, generation: Generation) -> None:
        request = generation.request
        self._generation = generation
        self._tokenizer = state.tokenizer
        self._header: dict[str, Any] = {
            "id": request.id,
            "created": int(time.time()),
            "model": state.model.id,
            "system_fingerprint": state.fingerprint,
        }
        self._streams = bool(body.stream)
        self._with_logprobs = request.sampling.logprobs is not None
        self._usage_chunk = bool(body.stream_options and body.stream_options.include_usage)
        self._prompt_ids = generation.prompts if request.report_tokens else None

    def start(self) -> Iterator[bytes]:
        return iter(())

    def fail(self, error: ErrorInfo) -> bytes:
        return sse_frame(error.json)

    @property
    def _usage(self) -> CompletionUsage:
        return CompletionUsage.of(self._generation.usage)


@dataclass(slots=True)
class ChatFold:
    """Events of one answer, added up."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[ToolCallStart, list[str]]] = field(default_factory=list)
    content_tokens: list[TokenInfo] = field(default_factory=list)
    reasoning_tokens: list[TokenInfo] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    def add(self, event: StreamEvent) -> None:
        match event:
            case GeneratedTokens(ids):
                self.token_ids += ids
            case ReasoningDelta(text, tokens):
                self.reasoning.append(text)
                self.reasoning_tokens += tokens
            case ContentDelta(text, tokens):
                self.content.append(text)
                self.content_tokens += tokens
            case ToolCallStart():
                self.calls.append((event, []))
            case ToolCallDelta(index, arguments):
                self.calls[index][1].append(arguments)
            case Finished(reason):
                self.finish_reason = reason

    def message(self, *, reasoning_alias: bool) -> ChatMessage:
        content, reasoning = "".join(self.content), "".join(self.reasoning) or None
        message = ChatMessage(
            role="assistant",
            content=content if content or not self.calls else None,
            refusal=None,
            reasoning_content=reasoning,
        )
        if reasoning_alias:
            message.reasoning = reasoning
        if self.calls:
            message.tool_calls = [
                FunctionToolCall(
                    id=start.id,
                    type="function",
                    function=FunctionCall(name=start.name, arguments="".join(arguments)),
                )
                for start, arguments in self.calls
            ]
        return message


class ChatBuilder(OpenAIBuilder):
    """Chunks of a chat completion, and the completion that they add up to."""

    def __init__(
        self, body: ChatCompletionRequest, state: AppState, generation: Generation
    ) -> None:
        super().__init__(body, state, generation)
        self._include_reasoning = generation.request.include_reasoning
        self._reasoning_alias = state.settings.reasoning_alias
        self._folds: dict[int, ChatFold] = {}

    def add(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        if isinstance(event, PrefillProgress):
            total = self._generation.usage.prompt_tokens
            progress = PromptProgress(total=total, processed=event.computed_tokens)
            yield self._chunk([], prompt_progress=progress)
            return
        is_first = index not in self._folds
        if is_first and self._streams:
            role = self._choice(index, self._delta(role="assistant", content=""))
            if self._prompt_ids is not None and not self._folds:
                yield self._chunk([role], prompt_token_ids=self._prompt_ids[0])
            else:
                yield self._chunk([role])
        fold = self._folds.setdefault(index, ChatFold())
        if isinstance(event, ReasoningDelta) and not self._include_reasoning:
            return
        if self._streams:
            yield self._chunk([self._event_choice(index, event)])
        else:
            fold.add(event)

    def end(self) -> Iterator[bytes]:
        if self._usage_chunk:
            yield self._chunk([], usage=self._usage)
        yield DONE

    def to_json(self) -> str:
        completion = ChatCompletion(
            **self._header,
            object="chat.completion",
            choices=[
                self._whole_choice(index, fold) for index, fold in sorted(self._folds.items())
            ],
            usage=self._usage,
        )
        if self._prompt_ids is not None:
            completion.prompt_token_ids = self._prompt_ids[0]
        return completion.model_dump_json(exclude_unset=True)

    def _event_choice(self, index: int, event: StreamEvent) -> ChunkChoice:
        match event:
            case GeneratedTokens(ids):
                choice = self._choice(index, self._delta())
                choice.token_ids = ids
                return choice
            case ReasoningDelta(text, tokens):
                logprobs = self._logprobs([], tokens)
                return self._choice(index, self._delta(reasoning=text), logprobs)
            case ContentDelta(text, tokens):
                logprobs = self._logprobs(tokens, [])
                return self._choice(index, self._delta(content=text), logprobs)
            case ToolCallStart(number, id, name):
                function = FunctionDelta(name=name, arguments="")
                call = CallDelta(index=number, id=id, type="function", function=function)
                return self._choice(index, self._delta(tool_calls=[call]))
            case ToolCallDelta(number, arguments):
                call = CallDelta(index=number, function=FunctionDelta(arguments=arguments))
                return self._choice(index, self._delta(tool_calls=[call]))
            case Finished(reason):
                return self._choice(index, self._delta(), finish_reason=reason)
        raise TypeError(f"unexpected event {event}")

    def _delta(self, reasoning: str | None = None, **fields: Any) -> ChatDelta:
        if self._reasoning_alias:
            fields["reasoning"] = reasoning
        return ChatDelta(reasoning_content=reasoning, **fields)

    @staticmethod
    def _choice(
        index: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> ChunkChoice:
        return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def _whole_choice(self, index: int, fold: ChatFold) -> ChatChoice:
        choice = ChatChoice(
            index=index,
            message=fold.message(reasoning_alias=self._reasoning_alias),
            logprobs=self._logprobs(fold.content_tokens, fold.reasoning_tokens),
            finish_reason=fold.finish_reason,
        )
        if self._prompt_ids is not None:
            choice.token_ids = fold.token_ids
        return choice

    def _logprobs(
        self, content: list[TokenInfo], reasoning: list[TokenInfo]
    ) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        logprobs = ChatLogprobs(content=TokenLogprob.of(self._tokenizer, content), refusal=None)
        if reasoning:
            logprobs.reasoning_content = TokenLogprob.of(self._tokenizer, reasoning)
        return logprobs

    def _chunk(self, choices: list[ChunkChoice], **fields: Any) -> bytes:
        if self._usage_chunk:
            fields.setdefault("usage", None)
        chunk = ChatCompletionChunk(
            **self._header, object="chat.completion.chunk", choices=choices, **fields
        )
        return sse_frame(chunk.model_dump_json(exclude_unset=True))
