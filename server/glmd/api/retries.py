"""Retries: a request sent again with its `x-request-id` gets the same answer.

Routers and clients repeat a request when they see no answer, which need not mean that there is
none. Without this, the repetition would be generated beside the first.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine, MutableMapping
from hashlib import blake2b
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmd.api.auth import Access
from glmd.api.middleware import REQUEST_ID
from glmd.api.observability.request_stats import HttpExchange

KEEP_SECONDS = 60.0
"""How long an answer is kept after its end."""

KEEP_BYTES = 64 << 20
"""Memory of all kept answers; older ones go first."""

MAX_BYTES = 16 << 20
"""Memory of an answer up to which it is kept."""

MESSAGE_BYTES = 512
"""Memory of a message beside its body; a stream has one for each event."""

PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Paths that generate."""

Key = tuple[str, str, str, bytes]
"""Owner, path, `x-request-id` and digest of the body."""


class _Answer:
    """The messages of a response, so far.

    Attributes:
        route: of the first request, from the first message on.
        size: bytes in memory so far.
        is_kept: false once the answer has been forgotten.
        followers: requests that wait for further messages.
        ended: moment of the end, in seconds of `time.monotonic()`; None: it goes on.
        changed: set at the next message, and when a follower leaves.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.route: Any = None
        self.size = 0
        self.is_kept = True
        self.followers = 0
        self.ended: float | None = None
        self.changed = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Whether the whole body has been sent."""
        last = self.messages[-1] if self.messages else {}
        return last.get("type") == "http.response.body" and not last.get("more_body", False)

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def follow(self, send: Send) -> None:
        """Send the answer from its beginning to its end."""
        sent = 0
        while True:
            for message in self.messages[sent:]:
                await send(_copy(message))
                sent += 1
            if sent == len(self.messages):
                if self.ended is not None:
                    return
                await self.changed.wait()


class RetryMiddleware:
    """Generate the answer to a request once, however often the request arrives.

    Requests are the same if owner, path, `x-request-id` and body are. While the first runs, and for
    `KEEP_SECONDS` after it has ended well, others get its answer: the whole of it, streamed as it
    was. The first goes on for them if its client leaves. An answer that failed or was cancelled is
    forgotten, so that a retry generates it again.

    Below `BodyLimitMiddleware`, which passes a body on in one message.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: OrderedDict[Key, _Answer] = OrderedDict()
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = Headers(scope=scope).get("x-request-id", "") if scope["type"] == "http" else ""
        if not REQUEST_ID.fullmatch(sent) or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        first = await receive()
        access: Access = scope["state"]["access"]
        digest = blake2b(first.get("body", b""), digest_size=16).digest()
        key = (access.owner, scope["path"], sent, digest)
        self._drop_old()
        answer = self._answers.get(key)
        if answer is None:
            await self._record(key, first, scope, receive, send)
            return
        scope["state"]["exchange"].is_retry = True
        answer.followers += 1
        try:
            await _unless_disconnected(answer.follow(send), receive)
        finally:
            scope["route"] = answer.route
            answer.followers -= 1
            answer.notify()

    async def _record(
        self, key: Key, first: Message, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer the first request, and keep what is sent."""
        answer = self._answers[key] = _Answer()
        pending = [first]

        async def read() -> Message:
            if pending:
                return pending.pop()
            message = await receive()
            while message["type"] == "http.disconnect" and answer.followers:
                await answer.changed.wait()
            if message["type"] == "http.disconnect" and not answer.is_complete:
                self._forget(key, answer)  # It will be cancelled.
            return message

        async def write(message: Message) -> None:
            answer.route = scope.get("route")
            if answer.is_kept or answer.followers:
                answer.messages.append(_copy(message))
                answer.size += MESSAGE_BYTES + len(message.get("body", b""))
                answer.notify()
            if answer.size > MAX_BYTES and not answer.followers:
                self._forget(key, answer)
                answer.messages.clear()
            await send(message)

        try:
            await self._app(scope, read, write)
        finally:
            answer.ended = time.monotonic()
            answer.notify()
            if not answer.is_complete or _has_failed(scope["state"]["exchange"]):
                self._forget(key, answer)
            if answer.is_kept:
                self._bytes += answer.size
                self._answers.move_to_end(key)
                self._drop_old()

    def _forget(self, key: Key, answer: _Answer) -> None:
        """Do not give a running answer to further requests."""
        if answer.is_kept:
            answer.is_kept = False
            del self._answers[key]

    def _drop_old(self) -> None:
        """Drop ended answers that are old, or more than there is room for.

        The ended ones are in the order of their ends, with running ones between them.
        """
        oldest = time.monotonic() - KEEP_SECONDS
        for key, answer in list(self._answers.items()):
            if answer.ended is None:
                continue
            if answer.ended > oldest and self._bytes <= KEEP_BYTES:
                return
            del self._answers[key]
            self._bytes -= answer.size


def _has_failed(exchange: HttpExchange) -> bool:
    """Whether an answer is an error, or ended in one."""
    failed = any(stats.finish in ("error", "cancelled") for stats in exchange.stats)
    return failed or exchange.status != HTTPStatus.OK


def _copy(message: MutableMapping[str, Any]) -> Message:
    """A message whose headers may be changed by who sends it."""
    copy = dict(message)
    if "headers" in copy:
        copy["headers"] = list(copy["headers"])
    return copy


async def _unless_disconnected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do `work`, until the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
