"""One HTTP request and its response, as the log and the metrics tell of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

if TYPE_CHECKING:
    from glmd.api.observability.request_stats import RequestStats

TRACE_HEADERS = ("traceparent", "tracestate")
"""Of W3C's trace context (https://www.w3.org/TR/trace-context/)."""

Api = Literal["chat", "completions", "responses", "messages"]


@dataclass(slots=True)
class HttpExchange:
    """What is known of one HTTP request.

    Attributes:
        id: the client's `x-request-id`, else one of ours.
        client: the address that it came from.
        key: the name of the API key that it brought; None: there is none.
        trace: the headers that tell of the client's trace, `traceparent` and `tracestate`.
        began: when its headers had arrived, in `time.monotonic`'s seconds.
        began_at: the same in Unix time.
        api: of a request that generates, which API's it is.
        model: the model that it names, if it does.
        stream: it asks for a stream.
        background: it is answered before what it asks for is done.
        route: the path of the route that served it, with its parameters by name, once it is over;
            None: there is no such route.
        status: of the response, once that has begun.
        ended: when the response was over, or the client gone, in `time.monotonic`'s seconds.
        records: what it had the engine do.
    """

    id: str
    method: str
    path: str
    client: str
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    trace: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    api: Api | None = None
    model: str | None = None
    stream: bool = False
    background: bool = False
    route: str | None = None
    status: int | None = None
    ended: float | None = None
    records: list[RequestStats] = field(default_factory=list)

    @classmethod
    def of(cls, scope: Scope, id: str) -> HttpExchange:
        """The exchange that an ASGI scope begins."""
        client, headers = scope.get("client"), Headers(scope=scope)
        return cls(
            id,
            scope["method"],
            scope["path"],
            client[0] if client else "",
            trace={name: headers[name] for name in TRACE_HEADERS if name in headers},
        )

    def end(self) -> None:
        """Note that it is over; without a response, the client has gone: 499, as nginx says."""
        self.ended = time.monotonic()
        self.status = self.status or 499

    def asks(
        self, api: Api, model: str | None, *, stream: bool | None, background: bool | None = False
    ) -> None:
        """Note what a request that generates asks for."""
        self.api = api
        self.model = model
        self.stream = bool(stream)
        self.background = bool(background)


def get_exchange(request: Request) -> HttpExchange:
    """The exchange that the request is of."""
    exchange: HttpExchange = request.state.exchange
    return exchange
