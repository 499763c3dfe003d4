"""An answer told as named events, which is how the Responses and the Messages API stream.

A `ResponseBuilder` turns the chat layer's events into its API's own and folds them into one object
on the way. A stream writes each event; a whole answer drains them and takes the object.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Protocol, TypeVar

from glmd.api.generation import Generation, Produced, Progress
from glmd.api.sse import frame, with_heartbeat
from glmd.chat.events import Event


class NamedEvent(Protocol):
    """A pydantic model of an event."""

    @property
    def type(self) -> str: ...

    def model_dump_json(self) -> str: ...


E = TypeVar("E", bound=NamedEvent)
E_co = TypeVar("E_co", bound=NamedEvent, covariant=True)


class ResponseBuilder(Protocol[E_co]):
    """One answer on its way."""

    def start(self) -> Iterator[E_co]:
        """What comes first."""

    def add(self, event: Event) -> Iterator[E_co]:
        """What an event becomes."""

    def keep_alive(self) -> E_co:
        """What says that the answer is still on its way."""

    def end(self) -> Iterator[E_co]:
        """What comes last, after `Finished`."""


async def stream_events(
    teller: ResponseBuilder[E], generation: Generation, *, keep_alive: float
) -> AsyncGenerator[E, None]:
    """All that a stream says, with a sign of life for each `keep_alive` seconds of silence.

    Raises: as `Generation.events`.
    """
    source = generation.events()
    begun = False
    async with aclosing(source), aclosing(with_heartbeat(source, keep_alive)) as items:
        async for item in items:
            if not begun:
                begun = True
                for told in teller.start():
                    yield told
            elif item is None:
                yield teller.keep_alive()
            if item is not None and not isinstance(item[1], Progress | Produced):
                for told in teller.add(item[1]):
                    yield told
    for told in teller.end():
        yield told


async def encode_sse(events: AsyncGenerator[NamedEvent, None]) -> AsyncGenerator[bytes, None]:
    """The events as they go over the wire."""
    async with aclosing(events):
        async for event in events:
            yield write(event)


async def drain(events: AsyncGenerator[NamedEvent, None]) -> None:
    """Let everything be told, for the sake of what it adds up to."""
    async with aclosing(events):
        async for _ in events:
            pass


def write(event: NamedEvent) -> bytes:
    """A frame, named as the event's type is."""
    return frame(event.model_dump_json(), event.type)
