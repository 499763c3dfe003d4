"""One request to the engine, read as events: what every generating route has in common."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

from glmd.api.observability.request_stats import RequestRegistry, RequestStats
from glmd.chat.events import Event, Finished
from glmd.engine_client.client import EngineClient
from glmd.engine_client.timeouts import NO_TIMEOUTS, RequestTimeouts
from glmd.errors import EngineUnavailable
from glmd.ipc import EngineRequest, SequenceOutput

T = TypeVar("T")


class Reader(Protocol):
    """Turns one sequence's outputs into events; see `glmd.chat.output_processor`."""

    completion_tokens: int
    reasoning_tokens: int

    def feed(self, output: SequenceOutput) -> list[Event]: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the prompt is computed; only if asked for."""

    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Produced:
    """The token ids behind the events that follow; only if asked for."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of a request, over all its sequences; the prompt counts once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    drafted: int
    accepted: int


class Generation:
    """A request in flight.

    Args:
        readers: one for each of the request's sequences.
        deadlines: by when it must have got somewhere.
        record: the request's, which `requests` keeps up.
        report_progress: let `Progress` tell how far the prompt is, if the request asks the engine.
        report_tokens: let `Produced` precede what each output gives.
        on_finished: called with the index of each sequence that ended by itself.
    """

    def __init__(
        self,
        engine: EngineClient,
        request: EngineRequest,
        readers: Sequence[Reader],
        *,
        deadlines: RequestTimeouts = NO_TIMEOUTS,
        requests: RequestRegistry,
        record: RequestStats,
        report_progress: bool = False,
        report_tokens: bool = False,
        on_finished: Callable[[int], None] = lambda index: None,
    ) -> None:
        self._engine = engine
        self._request = request
        self._readers = readers
        self._deadlines = deadlines
        self._requests = requests
        self._record = record
        self._report_progress = report_progress
        self._report_tokens = report_tokens
        self._on_finished = on_finished
        self._cached: dict[int, int] = {}

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._record.prompt_tokens,
            # Of several sequences all but one find the whole prompt computed by that one.
            cached_tokens=min(self._cached.values(), default=0),
            completion_tokens=sum(reader.completion_tokens for reader in self._readers),
            reasoning_tokens=sum(reader.reasoning_tokens for reader in self._readers),
            drafted=self._record.drafted,
            accepted=self._record.accepted,
        )

    async def events(self) -> AsyncGenerator[tuple[int, Event | Progress | Produced], None]:
        """Pairs of a sequence's index and what happened to it; each ends with `Finished`.

        Raises: as `EngineClient.generate`.
        """
        ended: set[int] = set()
        requests, record = self._requests, self._record
        with requests.in_flight(record):
            async with aclosing(self._engine.generate(self._request, self._deadlines)) as outputs:
                async for output in outputs:
                    index = output.index
                    if index in ended:
                        continue
                    requests.observe(record, output)
                    if output.prompt_tokens:
                        self._cached[index] = output.cached_tokens
                    if output.computed_tokens and self._report_progress:
                        yield index, Progress(output.computed_tokens)
                    if self._report_tokens and output.tokens:
                        yield index, Produced(output.tokens)
                    for event in self._readers[index].feed(output):
                        if isinstance(event, Finished):
                            ended.add(index)
                            requests.finished(record, event.reason)
                            self._on_finished(index)
                        yield index, event
                    if index in ended and output.finish_reason is None:
                        self._engine.cancel(self._request.id, index)
            if len(ended) < len(self._readers):
                raise EngineUnavailable("The engine cancelled this request.")


def total_usage(generations: Sequence[Generation]) -> Usage:
    """The usage of several requests together."""
    usages = [generation.usage for generation in generations]
    return Usage(
        *(sum(getattr(usage, each.name) for usage in usages) for each in dataclasses.fields(Usage))
    )


async def merge(
    sources: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """Items of several sources as they come, each with its source's number.

    The first error ends them all; so does closing the merged generator.
    """
    awaited = {asyncio.ensure_future(anext(each)): n for n, each in enumerate(sources)}
    try:
        while awaited:
            done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = awaited.pop(future)
                try:
                    item = future.result()
                except StopAsyncIteration:
                    continue
                awaited[asyncio.ensure_future(anext(sources[number]))] = number
                yield number, item
    finally:
        for future in awaited:
            future.cancel()
        if awaited:
            await asyncio.wait(awaited)
        for source in sources:
            await source.aclose()
