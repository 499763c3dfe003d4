"""`POST /v1/completions`: raw text, continued without a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request, Response

from glmd.api.context import ContextDep
from glmd.api.openai.chat import DONE, OpenAIBuilder
from glmd.api.openai.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    TextCompletion,
)
from glmd.api.request_body import JsonRoute
from glmd.api.serving import serve
from glmd.api.state import AppState, StateDep
from glmd.api.streaming import GeneratedTokens, Generation, StreamEvent, sse_frame
from glmd.chat.detokenizer import Detokenizer
from glmd.chat.types import ContentDelta, Finished, TokenInfo

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


@router.post("/api/v0/completions", include_in_schema=False)  # LM Studio's path
@router.post("/v1/completions", response_model=TextCompletion)
async def create_completion(
    body: CompletionRequest, http: Request, state: StateDep, context: ContextDep
) -> Response:
    """Continue one or several texts, streamed or whole."""
    build = partial(CompletionBuilder, body, state)
    return await serve(http, state, context, body, body.to_generation_request, build)


@dataclass(slots=True)
class CompletionFold:
    """Events of one answer, added up."""

    text: list[str] = field(default_factory=list)
    tokens: list[TokenInfo] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, event: StreamEvent) -> None:
        match event:
            case GeneratedTokens(ids):
                self.token_ids += ids
            case ContentDelta(text, tokens):
                self.text.append(text)
                self.tokens += tokens
            case Finished("stop" | "length" as reason):
                self.finish_reason = reason
            case _:
                raise TypeError(f"unexpected event {event}")


class TextOffset:
    """Offsets of an answer's tokens in its text, in characters."""

    def __init__(self, start: int) -> None:
        self._offset = start
        self._detokenizer = Detokenizer()

    def advance(self, data: bytes) -> int:
        """Offset of the next token, which has these bytes."""
        offset = self._offset
        self._offset += len(self._detokenizer.feed(data))
        return offset


class CompletionBuilder(OpenAIBuilder):
    """Chunks of a text completion, and the completion that they add up to."""

    def __init__(self, body: CompletionRequest, state: AppState, generation: Generation) -> None:
        super().__init__(body, state, generation)
        self._n = generation.request.n
        self._echoes = [
            state.tokenizer.decode(ids) if body.echo else "" for ids in generation.prompts
        ]
        self._folds: dict[int, CompletionFold] = {}
        self._offsets: dict[int, TextOffset] = {}

    def add(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        echo, is_first = self._echo(index), index not in self._folds
        if is_first:
            self._folds[index] = CompletionFold([echo])
            self._offsets[index] = TextOffset(len(echo))
        if not self._streams:
            self._folds[index].add(event)
            return
        delta = CompletionFold([echo] if is_first else [])
        delta.add(event)
        choice = self._choice(index, delta, self._offsets[index])
        if is_first and self._prompt_ids is not None:
            choice.prompt_token_ids = self._prompt_ids[index // self._n]
        chunk = self._completion([choice])
        if self._usage_chunk:
            chunk.usage = None
        yield sse_frame(chunk.model_dump_json(exclude_unset=True))

    def end(self) -> Iterator[bytes]:
        if self._usage_chunk:
            chunk = self._completion([])
            chunk.usage = self._usage
            yield sse_frame(chunk.model_dump_json(exclude_unset=True))
        yield DONE

    def to_json(self) -> str:
        choices = []
        for index, fold in sorted(self._folds.items()):
            choice = self._choice(index, fold, TextOffset(len(self._echo(index))))
            if self._prompt_ids is not None:
                choice.prompt_token_ids = self._prompt_ids[index // self._n]
            choices.append(choice)
        completion = self._completion(choices)
        completion.usage = self._usage
        return completion.model_dump_json(exclude_unset=True)

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n]

    def _completion(self, choices: list[CompletionChoice]) -> TextCompletion:
        return TextCompletion(**self._header, object="text_completion", choices=choices)

    def _choice(self, index: int, fold: CompletionFold, offset: TextOffset) -> CompletionChoice:
        choice = CompletionChoice(
            index=index,
            text="".join(fold.text),
            logprobs=self._logprobs(fold.tokens, offset) if self._with_logprobs else None,
            finish_reason=fold.finish_reason,
        )
        if self._prompt_ids is not None:
            choice.token_ids = fold.token_ids
        return choice

    def _logprobs(self, tokens: Sequence[TokenInfo], offset: TextOffset) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._spell(token.id) for token in tokens],
            token_logprobs=[token.logprobs.logprob for token in tokens],
            top_logprobs=[self._top_logprobs(token) for token in tokens],
            text_offset=[offset.advance(self._text_bytes(token.id)) for token in tokens],
        )

    def _top_logprobs(self, token: TokenInfo) -> dict[str, float]:
        """The likeliest tokens, and the chosen token."""
        top = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
        spelt = {self._spell(id): logprob for id, logprob in top}
        return spelt | {self._spell(token.id): token.logprobs.logprob}

    def _text_bytes(self, id: int) -> bytes:
        return b"" if id in self._tokenizer.special else self._tokenizer.token_bytes(id)

    def _spell(self, id: int) -> str:
        """A token's text; for bytes that are not UTF-8, `bytes:\\xe2`, as OpenAI writes them."""
        data = self._tokenizer.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
