"""Responses that are kept, so that later ones may go on from them: bounded, and in memory only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from glmd.api.responses.input import Item
from glmd.api.responses.protocol import ResponseObject
from glmd.errors import InvalidRequest
from glmd.utils.lru import LRUCache


@dataclass(frozen=True, slots=True)
class Stored:
    """A response and the conversation that led to it.

    Attributes:
        items: the conversation before the response's output, without instructions.
        size: of the items, in bytes of JSON.
    """

    response: ResponseObject
    items: Sequence[Item]
    size: int

    @property
    def conversation(self) -> list[Item]:
        """The items, then the output."""
        output = [item.model_dump(exclude_none=True) for item in self.response.output]
        return [*self.items, *output]


class ResponseStore:
    """Keeps the responses used last, and runs those in the background."""

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: bytes of JSON of all conversations together; what they share counts in each.
        """
        self._kept: LRUCache[str, Stored] = LRUCache(capacity)
        self._running: dict[str, tuple[Stored, asyncio.Task[None]]] = {}

    def find(self, id: str) -> Stored | None:
        """The response, finished or not."""
        running = self._running.get(id)
        return running[0] if running is not None else self._kept.get(id)

    def previous(self, id: str) -> Stored:
        """The response that another one goes on from.

        Raises:
            InvalidRequest: it is not here, or not done.
        """
        stored = self.find(id)
        if stored is None:
            raise InvalidRequest(
                f"previous_response_id: there is no response {id!r} here (any more).",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if stored.response.status not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"previous_response_id: the response {id!r} is {stored.response.status}.",
                param="previous_response_id",
            )
        return stored

    def resolve(self, item: Item, param: str) -> Item:
        """The item, or what it refers to by its id, which tells the response that it is of.

        Raises:
            InvalidRequest: that is not here.
        """
        if item.get("type") != "item_reference":
            return item
        id = item.get("id")
        parts = id.split("_") if isinstance(id, str) else []
        stored = self.find(f"resp_{parts[1]}") if len(parts) == 3 else None
        for output in stored.response.output if stored is not None else ():
            if output.id == id:
                return output.model_dump(exclude_none=True)
        raise InvalidRequest(
            f"{param}.id: there is no item {id!r} here (any more).", param=f"{param}.id"
        )

    def keep(self, stored: Stored) -> None:
        """Keep a finished response, if it fits."""
        size = stored.size + len(stored.response.model_dump_json())
        self._kept.put(stored.response.id, stored, size)

    def run(self, stored: Stored, work: Coroutine[Any, Any, None]) -> None:
        """Do what finishes a response in the background, and keep it then."""
        id = stored.response.id
        task = asyncio.create_task(work, name=id)
        self._running[id] = (stored, task)

        def done(_: asyncio.Task[None]) -> None:
            if self._running.pop(id, None) is not None:
                self.keep(stored)

        task.add_done_callback(done)

    async def cancel(self, id: str) -> Stored | None:
        """End a response in the background; None: there is none."""
        running = self._running.get(id)
        if running is None:
            return None
        stored, task = running
        task.cancel()
        await asyncio.wait([task])
        return stored

    async def delete(self, id: str) -> bool:
        """Forget a response, and end it if it is not done; False: it is not here."""
        running = self._running.pop(id, None)
        if running is not None:
            running[1].cancel()
            await asyncio.wait([running[1]])
        return self._kept.pop(id) is not None or running is not None

    async def close(self) -> None:
        """End what runs."""
        for id in list(self._running):
            await self.delete(id)


def size_of(items: Sequence[Item]) -> int:
    return len(json.dumps(items, ensure_ascii=False))


def get_store(request: Request) -> ResponseStore:
    """FastAPI dependency: the app's store."""
    store: ResponseStore = request.app.state.responses
    return store
