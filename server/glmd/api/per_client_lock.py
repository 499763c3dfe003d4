"""One thing at a time for each client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _ClientLine:
    """Those of one client: who is at it, and who waits."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    length: int = 0


class PerClientLock:
    """Lets one piece of work of each client go on; its others wait, first come, first served.

    What serves all of them one after the other (the thread for prompts, the process for grammars)
    so has one piece of each client to do at most, and clients take turns at it.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _ClientLine] = {}

    @asynccontextmanager
    async def acquire(self, client: str) -> AsyncIterator[None]:
        """Wait until it is the client's turn, which the block is."""
        line = self._lines.setdefault(client, _ClientLine())
        line.length += 1
        try:
            async with line.lock:
                yield
        finally:
            line.length -= 1
            if not line.length:
                del self._lines[client]

    def __len__(self) -> int:
        """Clients that are at it or wait."""
        return len(self._lines)
