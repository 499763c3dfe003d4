"""From events to OpenAI's text completions: chunks of a stream, or their fold."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from glmd.api.generation import Generation, Produced, Progress, merge, total_usage
from glmd.api.openai.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Header,
    Usage,
)
from glmd.api.sse import DONE, frame
from glmd.chat.detokenizer import Detokenizer
from glmd.chat.events import ContentDelta, Event, Finished, TokenInfo
from glmd.chat.tokenizer import Tokenizer


class CompletionBuilder:
    """Writes the events of several prompts' continuations as one completion.

    Args:
        n: answers per prompt; choice `p * n + i` is the i-th answer to prompt p.
        echoes: what each prompt's answers begin with.
        logprobs: whether the request asked for log-probabilities.
        usage_chunk: end a stream with the usage.
        prompt_ids: each prompt's token ids, if the request asked for token ids.
    """

    def __init__(
        self,
        header: Header,
        tokenizer: Tokenizer,
        *,
        n: int,
        echoes: Sequence[str],
        logprobs: bool,
        usage_chunk: bool,
        prompt_ids: Sequence[list[int]] | None,
    ) -> None:
        self._header = header
        self._tokenizer = tokenizer
        self._n = n
        self._echoes = echoes
        self._logprobs = logprobs
        self._usage_chunk = usage_chunk
        self._prompt_ids = prompt_ids
        self._places: dict[int, Place] = {}

    async def stream(self, generations: Sequence[Generation]) -> AsyncGenerator[bytes, None]:
        """The frames of a streamed answer."""
        started: set[int] = set()
        async with aclosing(self._events(generations)) as events:
            async for index, event in events:
                first = index not in started
                started.add(index)
                piece = Piece(self._echoes[index // self._n] if first else "")
                piece.add(event)
                chunk = self._completion([self._choice(index, piece, first=first)])
                if self._usage_chunk:
                    chunk.usage = None
                yield frame(chunk.model_dump_json(exclude_unset=True))
        if self._usage_chunk:
            chunk = self._completion([])
            chunk.usage = Usage.of(total_usage(generations))
            yield frame(chunk.model_dump_json(exclude_unset=True))
        yield DONE

    async def fold(self, generations: Sequence[Generation]) -> Completion:
        """The whole answer."""
        pieces: dict[int, Piece] = {}
        async with aclosing(self._events(generations)) as events:
            async for index, event in events:
                if index not in pieces:
                    pieces[index] = Piece(self._echoes[index // self._n])
                pieces[index].add(event)
        completion = self._completion(
            [self._choice(index, piece, first=True) for index, piece in sorted(pieces.items())]
        )
        completion.usage = Usage.of(total_usage(generations))
        return completion

    async def _events(
        self, generations: Sequence[Generation]
    ) -> AsyncGenerator[tuple[int, Event | Produced], None]:
        """The events of all, by choice."""
        sources = [generation.events() for generation in generations]
        async with aclosing(merge(sources)) as merged:
            async for number, (index, event) in merged:
                if not isinstance(event, Progress):
                    yield number * self._n + index, event

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._header.id,
            object="text_completion",
            created=self._header.created,
            model=self._header.model,
            system_fingerprint=self._header.system_fingerprint,
            choices=choices,
        )

    def _choice(self, index: int, piece: Piece, *, first: bool) -> CompletionChoice:
        choice = CompletionChoice(
            index=index,
            text=piece.text,
            logprobs=self._completion_logprobs(index, piece.tokens) if self._logprobs else None,
            finish_reason=piece.finish_reason,
        )
        if self._prompt_ids is not None:
            choice.token_ids = piece.produced
            if first:
                choice.prompt_token_ids = self._prompt_ids[index // self._n]
        return choice

    def _completion_logprobs(self, index: int, tokens: Sequence[TokenInfo]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._spell(token.id) for token in tokens],
            token_logprobs=[token.logprobs.logprob for token in tokens],
            top_logprobs=[self._likely(token) for token in tokens],
            text_offset=[self._offset(index, token.id) for token in tokens],
        )

    def _likely(self, token: TokenInfo) -> dict[str, float]:
        """The likely tokens, and the chosen one even if it is none of them."""
        likely = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
        spelt = {self._spell(id): logprob for id, logprob in likely}
        return spelt | {self._spell(token.id): token.logprobs.logprob}

    def _offset(self, index: int, id: int) -> int:
        """Where the next token of a choice begins, in characters of its whole text."""
        if index not in self._places:
            self._places[index] = Place(len(self._echoes[index // self._n]))
        special = id in self._tokenizer.special
        return self._places[index].step(b"" if special else self._tokenizer.token_bytes(id))

    def _spell(self, id: int) -> str:
        """A token's text, or, as OpenAI has it, `bytes:` and the bytes of what is no text."""
        spelling = self._tokenizer.token_bytes(id)
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


class Place:
    """A place in a text, before which so many characters stand whole."""

    def __init__(self, characters: int) -> None:
        self._characters = characters
        self._detokenizer = Detokenizer()

    def step(self, data: bytes) -> int:
        """The place, and go on behind a token's bytes."""
        here = self._characters
        self._characters += len(self._detokenizer.feed(data))
        return here


@dataclass(slots=True)
class Piece:
    """Events of one choice, put together."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    produced: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, event: Event | Produced) -> None:
        match event:
            case Produced(ids):
                self.produced += ids
            case ContentDelta(text, tokens):
                self.tokens += tokens
                self.text += text
            case Finished("stop" | "length" as reason):
                self.finish_reason = reason
            case _:
                raise TypeError(f"a raw completion cannot hold {event}")
