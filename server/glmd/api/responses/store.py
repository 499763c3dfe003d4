"""Stored responses that later requests continue, in memory and on disk.

A response in the background that streams has an `EventLog` beside it, in memory only.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from glmd.api.responses.input import InputItems, Item
from glmd.api.responses.objects import ErrorEvent, ResponseObject
from glmd.api.streaming import sse_frame
from glmd.utils.disk_lru import DiskLRU
from glmd.utils.fair_limiter import Reservation
from glmd.utils.lru import LRUCache, memory_bytes

EVENT_BYTES = 8
"""Memory of an event beside its frame: the list's reference."""

LOST_EVENTS = (
    "The events of this response are not stored any more, for lack of memory. Retrieve the response"
    " without stream."
)


class ResponseNotStored(HTTPException):
    """No response with this id is stored here, or none that the client may see."""

    def __init__(self, id: str) -> None:
        super().__init__(404, f"Response {id!r} is not stored, or not any more.")
        self.id = id


class EventLog:
    """Events of a response in the background, for streams that begin or go on later.

    The event at index N has sequence number N.

    Args:
        memory: Counts the events. An event without room ends the log, not the response.
    """

    def __init__(self, memory: Reservation) -> None:
        self._frames: list[bytes] = []
        self._memory: Reservation | None = memory
        """None: the response has ended."""
        self._lost = False
        self._changed: asyncio.Event | None = None
        """Set at the next event, and at the end. None: nobody waits."""

    def add(self, frame: bytes) -> None:
        """Add the next event."""
        if self._lost or self._memory is None:
            return
        if self._memory.grow(sys.getsizeof(frame) + EVENT_BYTES):
            self._frames.append(frame)
        else:
            self._lost = True
            self._frames = []
        self._notify()

    def end(self) -> None:
        """No further events come."""
        self._memory = None
        self._notify()

    async def follow(self, start: int) -> AsyncGenerator[bytes, None]:
        """Yield the events from index `start` on, those to come included, to the end."""
        index = start
        while not self._lost:
            if index < len(self._frames):
                yield self._frames[index]
                index += 1
            elif self._memory is None:
                return
            else:
                self._changed = self._changed or asyncio.Event()
                await self._changed.wait()
        event = ErrorEvent(code="events_lost", message=LOST_EVENTS, sequence_number=index)
        yield sse_frame(event.model_dump_json(), event.type)

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


@dataclass(slots=True)
class StoredResponse:
    """A response and the conversation before its output, without instructions.

    Attributes:
        owner: whose response it is (`Access.owner`).
        events: None: the response is not streamed in the background, or its events are gone.
        nbytes: bytes of memory; 0 until it is stored.
    """

    response: ResponseObject
    items: InputItems
    owner: str
    events: EventLog | None = None
    nbytes: int = 0

    @property
    def conversation(self) -> list[Item]:
        """The items, then the output."""
        output = [item.model_dump(exclude_none=True) for item in self.response.output]
        return [*self.items.earlier, *self.items.new, *output]

    def encode(self) -> bytes:
        """JSON without the events; inverted by `decode`."""
        items = [self.items.earlier, self.items.new]
        return json.dumps([self.response.model_dump(mode="json"), *items, self.owner]).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> StoredResponse:
        response, *items, owner = json.loads(encoded)
        return cls(ResponseObject.model_validate(response), InputItems(*items), owner)


class ResponseStore:
    """The responses used last, and those that run in the background.

    Large responses are weighed, encoded and decoded on a thread.

    Args:
        capacity: bytes of memory of all responses with their conversations and events; shared items
            count in each conversation. Also bytes of JSON in the file.
        file: where responses survive the process; None: nowhere.
    """

    def __init__(self, capacity: int, file: Path | None = None) -> None:
        self._kept: LRUCache[str, StoredResponse] = LRUCache(capacity)
        self._disk: DiskLRU | None = None
        if file is not None and capacity:
            self._disk = DiskLRU(file, "responses", capacity)
        self._thread = ThreadPoolExecutor(1, "stored responses")
        self._running: dict[str, tuple[StoredResponse, asyncio.Task[None]]] = {}
        self._entering: dict[str, StoredResponse] = {}
        """Finished responses that the thread has not stored yet."""

    async def find(self, ids: Iterable[str]) -> dict[str, StoredResponse]:
        """Responses by id, finished or running; without those that are not stored."""
        found: dict[str, StoredResponse] = {}
        missing: list[str] = []
        for id in dict.fromkeys(ids):
            stored = self._in_memory(id)
            if stored is not None:
                found[id] = stored
            else:
                missing.append(id)
        if missing and self._disk is not None:
            loop = asyncio.get_running_loop()
            found |= await loop.run_in_executor(self._thread, self._read, self._disk, missing)
        return found

    def _in_memory(self, id: str) -> StoredResponse | None:
        running = self._running.get(id)
        return running[0] if running is not None else self._entering.get(id) or self._kept.get(id)

    def _read(self, disk: DiskLRU, ids: Iterable[str]) -> dict[str, StoredResponse]:
        found: dict[str, StoredResponse] = {}
        for id in ids:
            stored = self._kept.get(id)  # stored by an earlier task of the thread
            if stored is None:
                encoded = disk.get(_key(id))
                if encoded is None:
                    continue
                stored = StoredResponse.decode(encoded)
                self._weigh_and_put(stored)
            found[id] = stored
        return found

    def keep(self, stored: StoredResponse, on_end: Callable[[], None] = lambda: None) -> None:
        """Store a finished response, if it fits, and call `on_end` when it is."""
        id = stored.response.id
        self._entering[id] = stored
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._thread, self._write, stored)

        def done(written: asyncio.Future[None]) -> None:
            self._entering.pop(id, None)
            on_end()
            written.result()

        future.add_done_callback(done)

    def _write(self, stored: StoredResponse) -> None:
        fits = self._weigh_and_put(stored)
        if fits and self._disk is not None and stored.response.store:
            self._disk.put(_key(stored.response.id), stored.encode())

    def _weigh_and_put(self, stored: StoredResponse) -> bool:
        """Put a response into memory, without its events if they do not fit.

        Returns: whether the response fits.
        """
        stored.nbytes = 0  # `memory_bytes` would count it
        stored.nbytes = memory_bytes(stored)
        if self._kept.put(stored.response.id, stored, stored.nbytes):
            return True
        if stored.events is None:
            return False
        stored.events = None
        return self._weigh_and_put(stored)

    def run(
        self,
        stored: StoredResponse,
        work: Coroutine[Any, Any, None],
        on_end: Callable[[], None],
    ) -> None:
        """Finish a response in the background, then store it and call `on_end`."""
        id = stored.response.id
        task = asyncio.create_task(work, name=id)
        self._running[id] = (stored, task)

        def done(_: asyncio.Task[None]) -> None:
            if stored.events is not None:
                stored.events.end()
            if self._running.pop(id, None) is not None:
                self.keep(stored, on_end)
            else:
                on_end()

        task.add_done_callback(done)

    async def cancel(self, id: str) -> StoredResponse | None:
        """Cancel a running response. None: no such response runs."""
        running = self._running.get(id)
        if running is None:
            return None
        stored, task = running
        task.cancel()
        await asyncio.wait([task])
        return stored

    async def delete(self, id: str) -> bool:
        """Delete a response, and cancel it if it runs. False: it is not stored."""
        running = self._running.pop(id, None)
        if running is not None:
            running[1].cancel()
            await asyncio.wait([running[1]])
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._delete, id) or running is not None

    def _delete(self, id: str) -> bool:
        found = self._kept.pop(id) is not None
        return (self._disk is not None and self._disk.delete(_key(id))) or found

    async def close(self) -> None:
        """Cancel the running responses, and finish writing the others."""
        for id in list(self._running):
            await self.delete(id)
        await asyncio.to_thread(self._thread.shutdown)
        if self._disk is not None:
            self._disk.close()


def _key(id: str) -> bytes:
    return id.encode("utf-8", "surrogatepass")


def get_store(request: Request) -> ResponseStore:
    """FastAPI dependency: the app's response store."""
    store: ResponseStore = request.app.state.responses
    return store
