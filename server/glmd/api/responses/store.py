"""Stored responses, which later requests can continue: with a size limit, in memory and on disk."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request

from glmd.api.responses.input import InputItems, Item
from glmd.api.responses.protocol import ResponseObject
from glmd.errors import InvalidRequest, invalid_field
from glmd.utils.disk_lru import DiskLRU
from glmd.utils.lru import LRUCache
from glmd.utils.text import quoted


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation before its output, without instructions.

    Attributes:
        owner: whose response it is (`Access.owner`).
    """

    response: ResponseObject
    items: InputItems
    owner: str

    @property
    def conversation(self) -> list[Item]:
        """The items, then the output."""
        output = [item.model_dump(exclude_none=True) for item in self.response.output]
        return [*self.items.earlier, *self.items.new, *output]

    def encode(self) -> bytes:
        """JSON; inverted by `decode`."""
        items = [self.items.earlier, self.items.new, self.items.size]
        return json.dumps([self.response.model_dump(mode="json"), *items, self.owner]).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> StoredResponse:
        response, *items, owner = json.loads(encoded)
        return cls(ResponseObject.model_validate(response), InputItems(*items), owner)


class ResponseStore:
    """The responses used last, and those that run in the background.

    Args:
        capacity: Bytes of JSON of all conversations; shared items count in each conversation.
        file: Where responses survive the process, within the same capacity; None: nowhere.
    """

    def __init__(self, capacity: int, file: Path | None = None) -> None:
        self._kept: LRUCache[str, StoredResponse] = LRUCache(capacity)
        self._disk: DiskLRU | None = None
        if file is not None and capacity:
            self._disk = DiskLRU(file, "responses", capacity)
        self._lock = threading.Lock()  # The input of a large body is read on a thread.
        self._writer = ThreadPoolExecutor(1, "stored responses")
        self._running: dict[str, tuple[StoredResponse, asyncio.Task[None]]] = {}

    def find(self, id: str) -> StoredResponse | None:
        """The response, finished or running."""
        running = self._running.get(id)
        with self._lock:
            stored = running[0] if running is not None else self._kept.get(id)
        if stored is None and self._disk is not None:
            encoded = self._disk.get(id.encode("utf-8", "surrogatepass"))
            if encoded is not None:
                stored = StoredResponse.decode(encoded)
                self._keep_in_memory(stored)
        return stored

    def read_input(
        self, input: str | list[Item], previous_id: str | None, owner: str
    ) -> InputItems:
        """Items of a request's input, after the conversation of the previous response.

        Args:
            owner: whose responses may be continued and referred to.

        Raises:
            InvalidRequest: the response is not stored, or not done.
        """
        if isinstance(input, str):
            input = [{"type": "message", "role": "user", "content": input}]
        new = [self._resolve(item, owner) for item in input]
        size = len(json.dumps(new, ensure_ascii=False))
        if not previous_id:
            return InputItems([], new, size)
        previous = self._previous(previous_id, owner)
        return InputItems(previous.conversation, new, previous.items.size + size)

    def _previous(self, id: str, owner: str) -> StoredResponse:
        stored = self.find(id)
        if stored is None or stored.owner != owner:
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

    def _resolve(self, item: Item, owner: str) -> Item:
        """The item that `item` refers to; itself if it is no reference, or to nothing stored.

        An item's ID holds its response's ID.
        """
        if item.get("type") != "item_reference":
            return item
        id = item.get("id")
        parts = id.split("_") if isinstance(id, str) else []
        stored = self.find(f"resp_{parts[1]}") if len(parts) == 3 else None
        is_own = stored is not None and stored.owner == owner
        for output in stored.response.output if stored is not None and is_own else ():
            if output.id == id:
                return output.model_dump(exclude_none=True)
        return item

    def keep(self, stored: StoredResponse) -> None:
        """Store a finished response, if it fits."""
        self._keep_in_memory(stored)
        if self._disk is not None and stored.response.store:
            self._writer.submit(self._write, self._disk, stored)

    @staticmethod
    def _write(disk: DiskLRU, stored: StoredResponse) -> None:
        disk.put(stored.response.id.encode(), stored.encode())

    def _keep_in_memory(self, stored: StoredResponse) -> None:
        size = stored.items.size + len(stored.response.model_dump_json())
        with self._lock:
            self._kept.put(stored.response.id, stored, size)

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
                self.keep(stored)
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
        with self._lock:
            found = self._kept.pop(id) is not None or running is not None
        if self._disk is not None:
            key = id.encode("utf-8", "surrogatepass")
            loop = asyncio.get_running_loop()
            found |= await loop.run_in_executor(self._writer, self._disk.delete, key)
        return found

    async def close(self) -> None:
        """Cancel the running responses, and finish writing the others."""
        for id in list(self._running):
            await self.delete(id)
        await asyncio.to_thread(self._writer.shutdown)
        if self._disk is not None:
            self._disk.close()


def get_store(request: Request) -> ResponseStore:
    """FastAPI dependency: the app's response store."""
    store: ResponseStore = request.app.state.responses
    return store
