"""Per-request context: client id, timeouts, and the slot for preparing a prompt."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from glmd.api.auth import Access
from glmd.api.observability.request_stats import HttpExchange, get_exchange
from glmd.api.state import AppState, StateDep
from glmd.engine_client.admission import Phase, RequestTimeouts
from glmd.errors import InvalidRequest

TIMEOUT_HEADERS: dict[Phase, str] = {
    "queue": "x-glmd-queue-timeout",
    "first_token": "x-glmd-first-token-timeout",
    "total": "x-glmd-timeout",
}
"""Headers with seconds. Headers, not body fields, because all APIs share them, and because the
argument `timeout` of the official clients is how long the client itself waits."""


def client_id(scope: Scope) -> str:
    """Return an opaque id for the address and API key of a request.

    Both count, because several users may share a key, and several programs an address. A key that
    is not valid does not: a client could send another with each request.
    """
    access: Access = scope["state"]["access"]
    address = scope["client"][0] if scope.get("client") else ""
    return hashlib.sha256(f"{address} {access.owner}".encode()).hexdigest()[:16]


async def get_access(request: Request) -> Access:
    """FastAPI dependency: what the request may see."""
    access: Access = request.state.access
    return access


AccessDep = Annotated[Access, Depends(get_access)]


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Properties of an HTTP request that every API shares.

    Attributes:
        exchange: the HTTP request and response, for logs and metrics.
        client: client id (`client_id`).
        owner: whose responses and cached turns the request may use (`Access.owner`).
        timeouts: limits on the time to each phase of the request.
    """

    exchange: HttpExchange
    client: str
    owner: str
    timeouts: RequestTimeouts


async def get_request_context(request: Request, state: StateDep) -> RequestContext:
    """FastAPI dependency: the request's context.

    Raises:
        EngineUnavailable: the engine is not ready.
        InvalidRequest: a timeout header is malformed.
    """
    settings = state.settings
    limits: dict[Phase, float | None] = {
        "queue": settings.queue_timeout,
        "first_token": settings.first_token_timeout,
        "total": settings.request_timeout,
    }
    for phase, name in TIMEOUT_HEADERS.items():
        if (value := request.headers.get(name)) is not None:
            # Headers can shorten the server's timeouts, not extend them.
            limits[phase] = min(parse_seconds(name, value), limits[phase] or math.inf)
    state.engine.require_available()
    timeouts = RequestTimeouts(asyncio.get_running_loop().time(), **limits)
    access: Access = request.state.access
    return RequestContext(get_exchange(request), client_id(request.scope), access.owner, timeouts)


ContextDep = Annotated[RequestContext, Depends(get_request_context)]


def parse_seconds(name: str, value: str) -> float:
    """Parse the value of header `name`.

    Raises:
        InvalidRequest: not a positive, finite number.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"{name}: must be a positive number of seconds.", param=name)
    return seconds


@asynccontextmanager
async def prepare_slot(
    request: Request, state: AppState, context: RequestContext
) -> AsyncIterator[None]:
    """Prepare the prompt and grammar in the block, one request per client at a time.

    Raises:
        Overloaded: the queue is full, or the queue timeout has passed.
        DeadlineExceeded: another timeout has passed.
        ClientDisconnect: the client disconnected before the block began.
    """
    queue, timeouts = state.engine.queue, context.timeouts
    ticket = queue.admit_or_reject(context.client, 1, 0)
    first = timeouts.first
    try:
        async with (
            asyncio.timeout_at(timeouts.time(first) if first else None) as timeout,
            state.client_lock.acquire(context.client),
        ):
            if await request.is_disconnected():
                raise ClientDisconnect
            yield
    except TimeoutError:
        if first is None or not timeout.expired():
            raise
        raise timeouts.error(first, queue.retry_after()) from None
    finally:
        queue.release(ticket)
