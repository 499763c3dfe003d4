"""`POST /v1/completions`: raw text, continued without a chat template."""

from __future__ import annotations

from collections.abc import Iterator
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
    PromptLogprob,
    TextCompletion,
)
from glmd.api.request_body import JsonRoute
from glmd.api.serving import serve
from glmd.api.state import AppState, StateDep
from glmd.api.streaming import (
    GeneratedTokens,
    Generation,
    PromptTokens,
    StreamEvent,
    sse_frame,
)
from glmd.chat.detokenizer import Detokenizer
from glmd.chat.types import ContentDelta, Finished, TokenInfo
from glmd.ipc import TokenLogprobs

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
        self._prompts = generation.prompts
        self._count = body.logprobs
        self._echo_count = body.logprobs if body.echo else None
        self._shown_count = body.prompt_logprobs
        self._scores: list[list[TokenInfo]] = [[] for _ in self._prompts]
        """Prompt tokens with log-probabilities, without each prompt's first."""
        self._scores_prompts = generation.request.prompt_logprobs is not None
        self._held: list[tuple[int, StreamEvent]] = []
        """Events of answers whose prompts still lack log-probabilities."""
        self._echoes = [
            state.tokenizer.decode(ids) if body.echo else "" for ids in generation.prompts
        ]
        self._folds: dict[int, CompletionFold] = {}
        self._offsets: dict[int, TextOffset] = {}

    def add(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        if not self._scores_prompts:
            yield from self._add(index, event)
            return
        if isinstance(event, PromptTokens):
            self._scores[index // self._n][event.start - 1 :] = event.tokens
        else:
            self._held.append((index, event))
        held, self._held = self._held, []
        for each, waiting in held:
            number = each // self._n
            if len(self._scores[number]) < len(self._prompts[number]) - 1:
                self._held.append((each, waiting))
            else:
                yield from self._add(each, waiting)

    def _add(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        echo, is_first = self._echo(index), index not in self._folds
        if is_first:
            self._folds[index] = CompletionFold([echo])
            self._offsets[index] = self._first_offset(index)
        if not self._streams:
            self._folds[index].add(event)
            return
        delta = CompletionFold([echo] if is_first else [])
        delta.add(event)
        choice = self._choice(index, delta, self._offsets[index], is_first=is_first)
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
            choices.append(self._choice(index, fold, self._first_offset(index), is_first=True))
        completion = self._completion(choices)
        completion.usage = self._usage
        return completion.model_dump_json(exclude_unset=True)

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n]

    def _completion(self, choices: list[CompletionChoice]) -> TextCompletion:
        return TextCompletion(**self._header, object="text_completion", choices=choices)

    def _first_offset(self, index: int) -> TextOffset:
        """Offset of the first token that has log-probabilities."""
        return TextOffset(0 if self._echo_count is not None else len(self._echo(index)))

    def _choice(
        self, index: int, fold: CompletionFold, offset: TextOffset, *, is_first: bool
    ) -> CompletionChoice:
        """A choice; `is_first` adds what is said of the prompt."""
        number = index // self._n
        logprobs = None
        if self._with_logprobs:
            logprobs = CompletionLogprobs(
                tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
            )
            if is_first and self._echo_count is not None:
                self._append(logprobs, self._prompts[number][0], None, offset)
                for token in self._scores[number]:
                    self._append(logprobs, token.id, token.logprobs, offset)
            for token in fold.tokens:
                self._append(logprobs, token.id, token.logprobs, offset)
        choice = CompletionChoice(
            index=index,
            text="".join(fold.text),
            logprobs=logprobs,
            finish_reason=fold.finish_reason,
        )
        if self._prompt_ids is not None:
            choice.token_ids = fold.token_ids
            if is_first:
                choice.prompt_token_ids = self._prompt_ids[number]
        if is_first and self._shown_count is not None:
            scored = [
                self._prompt_logprobs(each, self._shown_count) for each in self._scores[number]
            ]
            choice.prompt_logprobs = [None, *scored]
        return choice

    def _append(
        self, to: CompletionLogprobs, id: int, logprobs: TokenLogprobs | None, offset: TextOffset
    ) -> None:
        """Add a token; a prompt's first has no log-probabilities."""
        to.tokens.append(self._spell(id))
        to.token_logprobs.append(None if logprobs is None else logprobs.logprob)
        to.top_logprobs.append(None if logprobs is None else self._top_logprobs(id, logprobs))
        to.text_offset.append(offset.advance(self._text_bytes(id)))

    def _prompt_logprobs(self, token: TokenInfo, count: int) -> dict[str, PromptLogprob]:
        """The likeliest tokens, and the prompt's own, as vLLM shows them."""
        found, ids = token.logprobs, token.logprobs.top_ids
        rank = ids.index(token.id) + 1 if token.id in ids else None
        ranked = [(token.id, found.logprob, rank)]
        ranked += zip(ids[:count], found.top_logprobs, range(1, count + 1), strict=False)
        return {
            str(id): PromptLogprob(logprob=logprob, rank=rank, decoded_token=self._spell(id))
            for id, logprob, rank in ranked
        }

    def _top_logprobs(self, id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the token itself."""
        count = self._count
        top = zip(logprobs.top_ids[:count], logprobs.top_logprobs[:count], strict=True)
        return {self._spell(each): logprob for each, logprob in top} | {
            self._spell(id): logprobs.logprob
        }

    def _text_bytes(self, id: int) -> bytes:
        return b"" if id in self._tokenizer.special else self._tokenizer.token_bytes(id)

    def _spell(self, id: int) -> str:
        """A token's text; for bytes that are not UTF-8, `bytes:\\xe2`, as OpenAI writes them."""
        data = self._tokenizer.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
