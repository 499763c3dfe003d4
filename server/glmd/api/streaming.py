"""Server-sent events or whole answers, built from the engine's outputs.

`Generation` reads the outputs as events. An API's `ResponseBuilder` turns the events into frames,
and into the whole answer that the frames add up to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import anyio
from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from glmd.api.errors import ErrorInfo, log_unhandled, to_error
from glmd.api.generation_request import GenerationRequest
from glmd.api.observability.request_stats import RequestRegistry, RequestStats
from glmd.chat.output_processor import ChatOutputProcessor, CompletionOutputProcessor
from glmd.chat.types import Event, Finished, Prompt, TokenInfo
from glmd.engine_client.admission import RequestTimeouts
from glmd.engine_client.client import EngineClient
from glmd.errors import EngineUnavailable
from glmd.ipc import EngineRequest


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Progress of the prompt, if the request asks for it."""

    computed_tokens: int


@dataclass(frozen=True, slots=True)
class GeneratedTokens:
    """Token ids of the events that follow, if the request asks for them."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Prompt tokens with log-probabilities, if the request asks for them.

    They come in order before the first answer's other events, and may begin again.
    """

    start: int
    tokens: list[TokenInfo]


StreamEvent = Event | PrefillProgress | GeneratedTokens | PromptTokens

OutputProcessor = ChatOutputProcessor | CompletionOutputProcessor


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Token counts of a request, over all its sequences. A prompt counts once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class PromptRun:
    """One prompt in the engine.

    Attributes:
        processors: One for each of the request's sequences.
        cached: Cached prompt tokens, by sequence.
    """

    prompt: Prompt
    request: EngineRequest
    stats: RequestStats
    processors: Sequence[OutputProcessor]
    cached: dict[int, int] = field(default_factory=dict)


class Generation:
    """Events of a request's answers. The request is sent when the events are read.

    Args:
        on_finished: Called with each sequence that ended by itself.
    """

    def __init__(
        self,
        request: GenerationRequest,
        runs: Sequence[PromptRun],
        *,
        engine: EngineClient,
        registry: RequestRegistry,
        timeouts: RequestTimeouts,
        on_finished: Callable[[Prompt, ChatOutputProcessor], None],
    ) -> None:
        self.request = request
        self._runs = runs
        self._engine = engine
        self._registry = registry
        self._timeouts = timeouts
        self._on_finished = on_finished

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return [run.prompt.tokens.tolist() for run in self._runs]

    @property
    def usage(self) -> TokenUsage:
        runs = self._runs
        processors = [processor for run in runs for processor in run.processors]
        return TokenUsage(
            prompt_tokens=sum(run.stats.prompt_tokens for run in runs),
            # All sequences of a prompt but the first find the prompt cached by the first.
            cached_tokens=sum(min(run.cached.values(), default=0) for run in runs),
            completion_tokens=sum(processor.completion_tokens for processor in processors),
            reasoning_tokens=sum(processor.reasoning_tokens for processor in processors),
            drafted=sum(run.stats.drafted for run in runs),
            accepted=sum(run.stats.accepted for run in runs),
        )

    def events(self) -> AsyncGenerator[tuple[int, StreamEvent], None]:
        """Events with the index of their answer; each answer ends with `Finished`.

        Answer `p * n + i` is the i-th answer to prompt p.

        Raises: as `EngineClient.generate`.
        """
        sources = [self._run(run, n * self.request.n) for n, run in enumerate(self._runs)]
        return sources[0] if len(sources) == 1 else merge(sources)

    async def _run(
        self, run: PromptRun, offset: int
    ) -> AsyncGenerator[tuple[int, StreamEvent], None]:
        ended: set[int] = set()
        registry, request = self._registry, self.request
        with registry.in_flight(run.stats):
            async with aclosing(self._engine.generate(run.request, self._timeouts)) as outputs:
                async for output in outputs:
                    index = output.index
                    if index in ended:
                        continue
                    registry.observe(run.stats, output)
                    if output.prompt_tokens:
                        run.cached[index] = output.cached_tokens
                    if output.computed_tokens and request.report_progress:
                        yield offset + index, PrefillProgress(output.computed_tokens)
                    for piece in output.prompt_logprobs or ():
                        end = piece.start + len(piece.tokens)
                        ids = run.prompt.tokens[piece.start : end].tolist()
                        infos = list(map(TokenInfo, ids, piece.tokens))
                        yield offset + index, PromptTokens(piece.start, infos)
                    if output.tokens and request.report_tokens:
                        yield offset + index, GeneratedTokens(output.tokens)
                    processor = run.processors[index]
                    for event in processor.feed(output):
                        if isinstance(event, Finished):
                            ended.add(index)
                            registry.finished(run.stats, event.reason)
                            if isinstance(processor, ChatOutputProcessor):
                                self._on_finished(run.prompt, processor)
                        yield offset + index, event
                    if index in ended and output.finish_reason is None:
                        self._engine.cancel(run.request.id, index)
            if len(ended) < len(run.processors):
                raise EngineUnavailable("The engine cancelled this request.")


async def merge(
    sources: Sequence[AsyncGenerator[tuple[int, StreamEvent], None]],
) -> AsyncGenerator[tuple[int, StreamEvent], None]:
    """Items of several sources in order of arrival.

    The first error, or closing the merged generator, closes all sources.
    """
    pending = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                source = pending.pop(future)
                try:
                    item = future.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(source))] = source
                yield item
    finally:
        for future in pending:
            future.cancel()
        if pending:
            await asyncio.wait(pending)
        for source in sources:
            await source.aclose()


class ResponseBuilder(Protocol):
    """One answer in an API's form.

    Events go in; frames of a stream or the whole answer come out.

    A builder may leave out frames that are not streamed, and the whole answer of a stream.
    """

    def start(self) -> Iterator[bytes]:
        """Frames before the first event."""

    def add(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        """Frames of an event of answer `index`."""

    def end(self) -> Iterator[bytes]:
        """Frames after the last event."""

    @property
    def heartbeat(self) -> Callable[[], bytes] | None:
        """Makes a frame for a silent stream. None: the API has no such event."""

    def fail(self, error: ErrorInfo) -> bytes:
        """Last frame of a stream that failed."""

    def to_json(self) -> str:
        """The whole answer, after `end`."""


async def stream_frames(
    builder: ResponseBuilder, generation: Generation, *, heartbeat_interval: float | None = None
) -> AsyncGenerator[bytes, None]:
    """Frames of an answer.

    Args:
        heartbeat_interval: Seconds of silence before a heartbeat. None: no heartbeats.

    Raises: as `Generation.events`.
    """
    source = generation.events()
    heartbeat = builder.heartbeat
    items: AsyncGenerator[tuple[int, StreamEvent] | None, None] = source
    if heartbeat is not None and heartbeat_interval is not None:
        items = with_heartbeat(source, heartbeat_interval)
    started = False
    async with aclosing(source), aclosing(items):
        async for item in items:
            if not started:
                started = True
                for frame in builder.start():
                    yield frame
            elif item is None and heartbeat is not None:
                yield heartbeat()
            if item is not None:
                for frame in builder.add(*item):
                    yield frame
    for frame in builder.end():
        yield frame


async def drain(frames: AsyncGenerator[bytes, None]) -> None:
    """Make all frames, for the whole answer that they add up to."""
    async with aclosing(frames):
        async for _ in frames:
            pass


T = TypeVar("T")

FIRST_FRAME_TIMEOUT = 1.0
"""Seconds to wait for the first frame before the response begins with status 200. The engine's
refusals come within a step and so keep their own status; during a long prefill, headers and
heartbeats are sent."""


def sse_frame(data: str, event: str | None = None) -> bytes:
    """One event.

    Args:
        data: Text without line breaks, such as JSON.
    """
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {data}\n\n".encode()


class EventStream(EventSourceResponse):
    """Response of server-sent events.

    An error after the first frame becomes the last frame.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        on_error: Callable[[ErrorInfo], bytes],
        *,
        comments: float,
        headers: Mapping[str, str],
    ) -> None:
        """
        Args:
            on_error: Makes the frame of an error.
            comments: Seconds between keep-alive comments. 0: no comments.
        """
        super().__init__(
            self._body(),
            headers=headers,
            ping=comments,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
        )
        self._frames = frames
        self._first = asyncio.ensure_future(anext(frames, None))
        self._on_error = on_error

    async def prime(self) -> EventStream:
        """Wait at most `FIRST_FRAME_TIMEOUT` for the first frame; raise an earlier error."""
        try:
            done, _ = await asyncio.wait([self._first], timeout=FIRST_FRAME_TIMEOUT)
            if done:
                self._first.result()
        except BaseException:
            await self._close()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()

    async def _body(self) -> AsyncGenerator[bytes, None]:
        try:
            if (first := await self._first) is not None:
                yield first
            async for frame in self._frames:
                yield frame
        except Exception as error:
            log_unhandled(error)
            yield self._on_error(to_error(error))

    async def _close(self) -> None:
        """Cancel the request in the engine, unless the stream has ended."""
        self._first.cancel()
        await asyncio.wait([self._first])
        await self._frames.aclose()


async def with_heartbeat(
    source: AsyncGenerator[T, None], interval: float
) -> AsyncGenerator[T | None, None]:
    """Items of `source`, and None after each `interval` seconds without an item.

    The first None comes after at most `FIRST_FRAME_TIMEOUT`, when the response begins.
    """
    item = asyncio.ensure_future(anext(source))
    timeout = min(FIRST_FRAME_TIMEOUT, interval)
    try:
        while True:
            done, _ = await asyncio.wait([item], timeout=timeout)
            timeout = interval
            if not done:
                yield None
                continue
            try:
                result = item.result()
            except StopAsyncIteration:
                return
            yield result
            item = asyncio.ensure_future(anext(source))
    finally:
        item.cancel()
        await asyncio.wait([item])


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when the client disconnects.

    The request's body must have been read.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait([working, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        disconnect.cancel()
        working.cancel()
        await asyncio.wait([working])


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
