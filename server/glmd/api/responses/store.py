"""Stored responses, which later requests can continue: with a size limit, in memory and on disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request

from glmd.api.responses.input import InputItems, Item
from glmd.api.responses.objects import OutputItem, ResponseObject
from glmd.errors import InvalidRequest, invalid_field
from glmd.utils.disk_lru import DiskLRU
from glmd.utils.lru import LRUCache, memory_bytes
from glmd.utils.text import quoted


@dataclass(slots=True)
class StoredResponse:
    """A response and the conversation before its output, without instructions.

    Attributes:
        owner: whose response it is (`Access.owner`).
        nbytes: bytes of memory; 0 until it is stored.
    """

    response: ResponseObject
    items: InputItems
    owner: str
    nbytes: int = 0

    @property
    def conversation(self) -> list[Item]:
        """The items, then the output."""
        output = [item.model_dump(exclude_none=True) for item in self.response.output]
        return [*self.items.earlier, *self.items.new, *output]

    def encode(self) -> bytes:
        """JSON; inverted by `decode`."""
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
        capacity: bytes of memory of all responses with their conversations; shared items count in
            each conversation. Also bytes of JSON in the file.
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
        stored.nbytes = memory_bytes(stored)
        return self._kept.put(stored.response.id, stored, stored.nbytes)

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


# -- the input of a request ---------------------------------------------------------------


def referred_ids(input: str | list[Item], previous_id: str | None) -> Iterator[str]:
    """Ids of the responses that a request's input continues or refers to."""
    if previous_id:
        yield previous_id
    for item in input if isinstance(input, list) else ():
        if item.get("type") == "item_reference" and (id := _response_of(item)) is not None:
            yield id


def read_input(
    input: str | list[Item],
    previous_id: str | None,
    stored: Mapping[str, StoredResponse],
) -> InputItems:
    """Items of a request's input, after the conversation of the previous response.

    Args:
        stored: those of `referred_ids` that the client may use.

    Raises:
        InvalidRequest: the response is not stored, or not done.
    """
    if isinstance(input, str):
        input = [{"type": "message", "role": "user", "content": input}]
    outputs = {item.id: item for found in stored.values() for item in found.response.output}
    new = [_resolve(item, outputs) for item in input]
    return InputItems(_previous(previous_id, stored).conversation if previous_id else [], new)


def _previous(id: str, own: Mapping[str, StoredResponse]) -> StoredResponse:
    stored = own.get(id)
    if stored is None:
        raise InvalidRequest(
            f"previous_response_id: response {quoted(id)} is not stored, or not any more.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if stored.response.status not in ("completed", "incomplete"):
        raise invalid_field(
            "previous_response_id", f"response {quoted(id)} is {stored.response.status}."
        )
    return stored


def _response_of(item: Item) -> str | None:
    """The id of an item's response, which the item's own id holds."""
    id = item.get("id")
    parts = id.split("_") if isinstance(id, str) else []
    return f"resp_{parts[1]}" if len(parts) == 3 else None


def _resolve(item: Item, outputs: Mapping[str, OutputItem]) -> Item:
    """The item that `item` refers to; itself if it is no reference, or to nothing stored."""
    if item.get("type") != "item_reference":
        return item
    id = item.get("id")
    found = outputs.get(id) if isinstance(id, str) else None
    return item if found is None else found.model_dump(exclude_none=True)


def get_store(request: Request) -> ResponseStore:
    """FastAPI dependency: the app's response store."""
    store: ResponseStore = request.app.state.responses
    return store
