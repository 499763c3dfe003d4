"""From events to OpenAI's chat answers: chunks of a stream, or their fold."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from glmd.api.generation import Generation, Produced, Progress
from glmd.api.openai.logprobs import spell_logprobs
from glmd.api.openai.protocol import (
    CallDelta,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    Header,
    PromptProgress,
    ToolCall,
    Usage,
)
from glmd.api.sse import DONE, frame
from glmd.chat.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    TokenInfo,
    ToolCallDelta,
    ToolCallStart,
)
from glmd.chat.tokenizer import Tokenizer


class ChatBuilder:
    """Writes the events of one answer as chunks, or as one completion.

    Args:
        logprobs: whether the request asked for log-probabilities.
        usage_chunk: end a stream with the usage.
        prompt_ids: the prompt's token ids, if the request asked for token ids.
    """

    def __init__(
        self,
        header: Header,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        usage_chunk: bool,
        prompt_ids: list[int] | None,
    ) -> None:
        self._header = header
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage_chunk = usage_chunk
        self._prompt_ids = prompt_ids

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The frames of a streamed answer."""
        started: set[int] = set()
        async with aclosing(generation.events()) as events:
            async for index, event in events:
                if isinstance(event, Progress):
                    yield self._write([], progress=self._prompt_progress(generation, event))
                    continue
                if index not in started:
                    role = self._choice(index, Delta(role="assistant", content=""))
                    yield self._write([role], prompt_ids=None if started else self._prompt_ids)
                    started.add(index)
                yield self._write([self._chunk_choice(index, event)])
        if self._usage_chunk:
            yield self._write([], usage=Usage.of(generation.usage))
        yield DONE

    async def fold(self, generation: Generation) -> ChatCompletion:
        """The whole answer."""
        folds: dict[int, Fold] = {}
        async with aclosing(generation.events()) as events:
            async for index, event in events:
                if not isinstance(event, Progress):
                    folds.setdefault(index, Fold()).add(event)
        completion = ChatCompletion(
            id=self._header.id,
            object="chat.completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=self._header.system_fingerprint,
            choices=[self._whole_choice(index, fold) for index, fold in sorted(folds.items())],
            usage=Usage.of(generation.usage),
        )
        if self._prompt_ids is not None:
            completion.prompt_token_ids = self._prompt_ids
        return completion

    def _whole_choice(self, index: int, fold: Fold) -> ChatChoice:
        choice = ChatChoice(
            index=index,
            message=fold.message(),
            logprobs=self._chat_logprobs(fold.content_tokens, fold.reasoning_tokens),
            finish_reason=fold.finish_reason,
        )
        if self._prompt_ids is not None:
            choice.token_ids = fold.produced
        return choice

    def _chunk_choice(self, index: int, event: Event | Produced) -> ChunkChoice:
        match event:
            case Produced(ids):
                choice = self._choice(index, Delta())
                choice.token_ids = ids
                return choice
            case ReasoningDelta(text, tokens):
                logprobs = self._chat_logprobs([], tokens)
                return self._choice(index, Delta(reasoning_content=text), logprobs)
            case ContentDelta(text, tokens):
                logprobs = self._chat_logprobs(tokens, [])
                return self._choice(index, Delta(content=text), logprobs)
            case ToolCallStart(call, id, name):
                start = CallDelta(
                    index=call,
                    id=id,
                    type="function",
                    function=FunctionDelta(name=name, arguments=""),
                )
                return self._choice(index, Delta(tool_calls=[start]))
            case ToolCallDelta(call, arguments):
                delta = CallDelta(index=call, function=FunctionDelta(arguments=arguments))
                return self._choice(index, Delta(tool_calls=[delta]))
            case Finished(reason):
                return self._choice(index, Delta(), finish_reason=reason)

    @staticmethod
    def _choice(
        index: int,
        delta: Delta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> ChunkChoice:
        return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def _write(
        self,
        choices: list[ChunkChoice],
        *,
        usage: Usage | None = None,
        progress: PromptProgress | None = None,
        prompt_ids: list[int] | None = None,
    ) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._header.id,
            object="chat.completion.chunk",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=self._header.system_fingerprint,
            choices=choices,
        )
        if self._usage_chunk:
            chunk.usage = usage
        if progress is not None:
            chunk.prompt_progress = progress
        if prompt_ids is not None:
            chunk.prompt_token_ids = prompt_ids
        return frame(chunk.model_dump_json(exclude_unset=True))

    def _prompt_progress(self, generation: Generation, progress: Progress) -> PromptProgress:
        return PromptProgress(
            total=generation.usage.prompt_tokens, processed=progress.computed_tokens
        )

    def _chat_logprobs(
        self, content: Sequence[TokenInfo], reasoning: Sequence[TokenInfo]
    ) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        logprobs = ChatLogprobs(content=spell_logprobs(self._tokenizer, content), refusal=None)
        if reasoning:
            logprobs.reasoning_content = spell_logprobs(self._tokenizer, reasoning)
        return logprobs


@dataclass(slots=True)
class Fold:
    """The events of one sequence, put together."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[tuple[ToolCallStart, list[str]]] = field(default_factory=list)
    reasoning_tokens: list[TokenInfo] = field(default_factory=list)
    content_tokens: list[TokenInfo] = field(default_factory=list)
    produced: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    def add(self, event: Event | Produced) -> None:
        match event:
            case Produced(ids):
                self.produced += ids
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

    def message(self) -> ChatMessage:
        content = "".join(self.content)
        message = ChatMessage(
            role="assistant", content=content if content or not self.calls else None, refusal=None
        )
        if self.reasoning:
            message.reasoning_content = "".join(self.reasoning)
        if self.calls:
            message.tool_calls = [
                ToolCall(
                    id=start.id,
                    type="function",
                    function=FunctionCall(name=start.name, arguments="".join(arguments)),
                )
                for start, arguments in self.calls
            ]
        return message
