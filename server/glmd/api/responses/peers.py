"""Stored responses of other replicas: asked for when a request names one that is not stored here.

A request that was passed on has `Via: 1.1 glmd` and is not passed on again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from glmd.api.request_body import JsonRoute
from glmd.api.responses.store import ResponseNotStored, StoredResponse
from glmd.utils.lru import memory_bytes

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("glmd")

CONNECT_SECONDS = 2.0
"""A Mac that is off does not refuse a connection."""

READ_SECONDS = 300.0
"""Longest silence of a stream; comments come much more often, unless they are turned off."""

LOCATE_SECONDS = 5.0
"""Longest time in which a peer says whether it stores a response."""

KEY_HEADERS = ("authorization", "x-api-key")

VIA = "1.1 glmd"

OURS = re.compile(r"resp_[0-9a-zA-Z]+")
"""The ids that this server gives."""


class Peers:
    """The other replicas.

    Args:
        urls: returns their base URLs; this server's own may be among them.
    """

    def __init__(self, urls: Callable[[], Iterable[str]]) -> None:
        self._urls = urls
        self._client: httpx.AsyncClient | None = None

    async def find(self, ids: Iterable[str], request: Request) -> dict[str, StoredResponse]:
        """Responses by id that peers show to the request's client."""
        found = await asyncio.gather(*(self._find(id, request) for id in ids))
        return {stored.response.id: stored for stored in found if stored is not None}

    async def _find(self, id: str, request: Request) -> StoredResponse | None:
        peer = await self._locate(id, request)
        if peer is None:
            return None
        url = f"{peer}/v1/responses/{id}/conversation"
        response = await self._send("GET", url, request)
        if response is None or response.status_code != 200:
            return None
        try:
            return await asyncio.to_thread(_decode, response.content)
        except ValueError:
            log.warning("Peer %s stores responses in the form of another version.", peer)
            return None

    async def forward(self, id: str, request: Request) -> Response | None:
        """The answer to the request of the peer that stores response `id`; None: none does."""
        peer = await self._locate(id, request)
        if peer is None:
            return None
        path = request.scope["route"].path_format.replace("{id}", id)
        url = f"{peer}{path}?{request.url.query}"
        answer = await self._send(request.method, url, request, stream=True)
        if answer is None:
            return None
        headers = {"content-type": answer.headers.get("content-type", "application/json")}
        return StreamingResponse(_chunks(answer), answer.status_code, headers)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _locate(self, id: str, request: Request) -> str | None:
        """The URL of the first peer that says that it stores the response."""
        if VIA in request.headers.get("via", "") or OURS.fullmatch(id) is None:
            return None

        async def ask(peer: str) -> str | None:
            url = f"{peer}/v1/responses/{id}"
            response = await self._send("HEAD", url, request, seconds=LOCATE_SECONDS)
            if response is not None and response.status_code == 401:
                log.warning("Peer %s does not know the key of a client of this server.", peer)
            return peer if response is not None and response.status_code == 200 else None

        asked = [asyncio.create_task(ask(peer)) for peer in self._urls()]
        try:
            for answered in asyncio.as_completed(asked):
                if (peer := await answered) is not None:
                    return peer
        finally:
            for task in asked:
                task.cancel()
        return None

    async def _send(
        self,
        method: str,
        url: str,
        request: Request,
        *,
        seconds: float = READ_SECONDS,
        stream: bool = False,
    ) -> httpx.Response | None:
        """Send a request with the client's key; None: the peer cannot be reached."""
        import httpx  # noqa: PLC0415  # only servers that have peers load it

        if self._client is None:
            self._client = httpx.AsyncClient(trust_env=False)
        headers = {name: request.headers[name] for name in KEY_HEADERS if name in request.headers}
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        message = self._client.build_request(
            method, url, headers=headers | {"via": VIA}, timeout=timeout
        )
        try:
            return await self._client.send(message, stream=stream)
        except httpx.TransportError as error:
            log.warning("No answer of peer %s: %r", message.url.netloc.decode(), error)
            return None


def _decode(encoded: bytes) -> StoredResponse:
    stored = StoredResponse.decode(encoded)
    stored.nbytes = memory_bytes(stored)
    return stored


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(answer):
        async for chunk in answer.aiter_bytes():
            yield chunk


class PeerRoute(JsonRoute):
    """Route that passes a request for a response that is not stored here on to a peer."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_forward(request: Request) -> Response:
            try:
                return await handle(request)
            except ResponseNotStored as error:
                answer = await get_peers(request).forward(error.id, request)
                if answer is None:
                    raise
                return answer

        return handle_or_forward


def get_peers(request: Request) -> Peers:
    """FastAPI dependency: the app's peers."""
    peers: Peers = request.app.state.peers
    return peers
