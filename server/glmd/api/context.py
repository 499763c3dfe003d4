"""On whose behalf a request is served, and how long it may take."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from glmd.api.client_id import client_id
from glmd.api.observability.exchange import HttpExchange, get_exchange
from glmd.api.state import AppState, get_state
from glmd.engine_client.timeouts import Phase, RequestTimeouts
from glmd.errors import InvalidRequest

TIMEOUT_HEADERS: dict[Phase, str] = {
    "queue": "x-glmd-queue-timeout",
    "first_token": "x-glmd-first-token-timeout",
    "total": "x-glmd-timeout",
}
"""Headers with seconds, by what they limit. Headers, because they mean the same to every API, and
`timeout` in the official clients' arguments is something else: how long the client itself waits."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What holds for one HTTP request, whatever it asks for.

    Attributes:
        exchange: the request and its response, for those who watch.
        client: whose it is, as an opaque name.
        deadlines: by when it must have got somewhere.
    """

    exchange: HttpExchange
    client: str
    timeouts: RequestTimeouts


async def get_request_context(
    request: Request, service: Annotated[AppState, Depends(get_state)]
) -> RequestContext:
    """FastAPI dependency: the request's terms.

    Raises:
        EngineUnavailable: it would be for nothing to read further.
        InvalidRequest: a header is malformed.
    """
    settings = service.settings
    limits: dict[Phase, float | None] = {
        "queue": settings.queue_timeout,
        "first_token": settings.first_token_timeout,
        "total": settings.request_timeout,
    }
    for phase, name in TIMEOUT_HEADERS.items():
        if (sent := request.headers.get(name)) is not None:
            # A client can be less patient than the server, not more.
            limits[phase] = min(read_seconds(name, sent), limits[phase] or math.inf)
    client = client_id(request.scope)
    service.engine.require_ready()
    return RequestContext(
        get_exchange(request), client, RequestTimeouts(asyncio.get_running_loop().time(), **limits)
    )


GivenTerms = Annotated[RequestContext, Depends(get_request_context)]


@asynccontextmanager
async def prepare_slot(
    request: Request, service: AppState, terms: RequestContext
) -> AsyncIterator[None]:
    """The way of a request up to the engine, in the block: in the client's turn, and in time.

    Raises:
        Overloaded: there is no room to wait for that.
        Overloaded, DeadlineExceeded: it takes too long.
        ClientDisconnect: nobody waits for it any more.
    """
    queue, deadlines = service.engine.queue, terms.timeouts
    place = queue.admit_or_reject(terms.client, 1, 0)
    first = deadlines.first
    try:
        async with (
            asyncio.timeout_at(deadlines.time(first) if first else None) as timeout,
            service.one_each.acquire(terms.client),
        ):
            if await request.is_disconnected():
                raise ClientDisconnect
            yield
    except TimeoutError:
        if first is None or not timeout.expired():
            raise
        raise deadlines.error(first, queue.retry_after()) from None
    finally:
        queue.release(place)


def read_seconds(name: str, value: str) -> float:
    """
    Raises:
        InvalidRequest: it is no number above 0.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"The header {name} must be a number of seconds above 0.", param=name)
    return seconds
