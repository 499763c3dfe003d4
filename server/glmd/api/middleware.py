"""ASGI middleware: request ids, header limits, hosts, origins, API keys, HEAD.

Plain ASGI, because Starlette's `BaseHTTPMiddleware` hides the client's disconnect from a stream.

A browser lets any page send requests to any address. `HostCheckMiddleware` refuses pages whose own
name resolves to this machine (DNS rebinding), `OriginCheckMiddleware` refuses pages of other sites.
Starlette's `TrustedHostMiddleware` does not fit: it knows no addresses (IPv6, loopback, the address
that the server listens on), checks the first of several Host headers only, and answers in plain
text.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmd.api import webui
from glmd.api.auth import Access, ApiKeyStore
from glmd.api.errors import ErrorInfo, error_response
from glmd.api.observability.request_stats import HttpExchange
from glmd.config import Settings
from glmd.utils.logging import request_id
from glmd.utils.memory import exit_if_out_of_memory

MAX_URL_BYTES = 8192
MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 * 1024
"""Names and values together. Browsers send the cookies of every server on localhost to every port,
which may be a few KiB."""

MAX_HEAD_BYTES = 2 * MAX_HEADER_BYTES
"""Limit of the HTTP server, which closes the connection with a bare 400."""

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""Format of an `x-request-id` header that is used as the request's id."""

SLASHES = re.compile("//+")

BARE_PATH = re.compile(r"/(chat/completions|completions|embeddings|models|responses)(/|$)")
"""Paths of OpenAI's API without /v1, as clients ask whose base URL lacks it."""

OPEN_PATHS = frozenset({"/livez", "/health", "/api/hello"}) | webui.PATHS
"""Paths that need no API key: health checks, and the page that asks for the key."""

HOST_HEADER = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:@/?#\[\]]+))(?::\d{1,5})?")
"""RFC 9110, 7.2: an IPv6 address in brackets or a name, then an optional port."""

CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")
"""Names of the host machine inside containers. No public site can have them: `.internal` is
reserved (ICANN, 2024)."""

PREFLIGHT_SECONDS = 600


class RequestIdMiddleware:
    """Give every request an id, and report finished requests.

    The id is the client's `x-request-id` if valid, else random. Responses carry the id as
    `x-request-id` and as `request-id`, which is Anthropic's name.

    Args:
        on_end: called with every finished exchange.
    """

    def __init__(self, app: ASGIApp, on_end: Sequence[Callable[[HttpExchange], None]]) -> None:
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        exchange = HttpExchange.of(scope, id)
        scope.setdefault("state", {}).update(request_id=id, exchange=exchange)
        token = request_id.set(id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = id
                exchange.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            exit_if_out_of_memory(error)
            if exchange.status is None:
                exchange.status = 500  # sent by Starlette's ServerErrorMiddleware
            raise
        finally:
            exchange.route = getattr(scope.get("route"), "path", None)
            exchange.end()
            for notify in self._on_end:
                notify(exchange)
            request_id.reset(token)


class NormalizePathMiddleware:
    """Serve `//v1/models/` and `/models` as `/v1/models`.

    Base URLs end in a slash, bring one too many, or lack `/v1`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
            scope["path"] = f"/v1{path}" if BARE_PATH.match(path) else path
        await self._app(scope, receive, send)


class _CheckMiddleware:
    """Answer with an error instead of calling the app where `check` finds one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def check(self, scope: Scope) -> ErrorInfo | None:
        """Return the error of an HTTP request; None: pass the request on."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.check(scope) if scope["type"] == "http" else None
        if error is not None:
            await error_response(error, scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class HeaderLimitMiddleware(_CheckMiddleware):
    """Refuse a URL or headers larger than the limits, and name what is too large."""

    def check(self, scope: Scope) -> ErrorInfo | None:
        kind = "invalid_request_error"
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
            return ErrorInfo(414, kind, f"The URL is longer than {MAX_URL_BYTES} bytes.", "url")
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS:
            return ErrorInfo(431, kind, f"More than {MAX_HEADERS} headers.", "headers")
        if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            name = max(headers, key=lambda header: len(header[1]))[0].decode("latin-1")[:100]
            message = (
                f"The headers are larger than {MAX_HEADER_BYTES} bytes; the largest is {name}."
            )
            return ErrorInfo(431, kind, message, f"headers.{name}")
        return None


class HostCheckMiddleware(_CheckMiddleware):
    """Refuse requests whose Host header is not a name of this server.

    Names of the server are loopback's, the address or name that the server listens on, the names
    that containers have for their host, and `allowed`. A server that listens on every address also
    accepts every address and this machine's own name: an address cannot be the name of a page on
    another server.

    Args:
        host: address or name that the server listens on.
        allowed: further names; `*` matches any text.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str]) -> None:
        super().__init__(app)
        self._bound = _ip_address(host)
        names = ["localhost", *CONTAINER_HOSTS, host, *allowed]
        if self._bound is not None and self._bound.is_unspecified:
            own = socket.gethostname()
            short = own.partition(".")[0]
            names += [own, short, f"{short}.local"]
        self._names = re.compile(match_any(name.lower() for name in names))

    def check(self, scope: Scope) -> ErrorInfo | None:
        # Every browser sends the header; other clients may omit it.
        for host in Headers(scope=scope).getlist("host"):
            if not self.is_allowed(host):
                message = (
                    f"Host {host[:100]!r} is not allowed. Add it to the setting allowed_hosts."
                )
                kind = "invalid_request_error"
                return ErrorInfo(421, kind, message, "Host", "host_not_allowed")
        return None

    def is_allowed(self, host: str) -> bool:
        """Whether `host`, the value of a Host header, is a name of this server."""
        parts = HOST_HEADER.fullmatch(host)
        if parts is None:
            return False
        name = (parts[1] or parts[2]).lower().removesuffix(".")
        address = _ip_address(name)
        if address is not None and (address.is_loopback or address == self._bound):
            return True
        if address is not None and self._bound is not None and self._bound.is_unspecified:
            return True
        return self._names.fullmatch(name) is not None


class OriginCheckMiddleware(_CheckMiddleware):
    """Refuse requests of pages of other sites, unless their origin is allowed.

    Browsers send `Origin` with every request that could change something, and with every request
    whose answer a page of another site could read.

    Args:
        allowed: origins such as `https://chat.example.org`; `*` matches any text.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        super().__init__(app)
        self._allowed = re.compile(match_any(allowed) or r"(?!)")

    def check(self, scope: Scope) -> ErrorInfo | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        for origin in headers.getlist("origin"):
            if not (is_same_origin(origin, host) or self._allowed.fullmatch(origin)):
                message = (
                    f"Origin {origin[:100]!r} is not allowed. Add it to the setting cors_origins."
                )
                return ErrorInfo(403, "permission_error", message, "Origin", "origin_not_allowed")
        return None


class ApiKeyMiddleware(_CheckMiddleware):
    """Require an API key, except for `OPEN_PATHS`.

    Sets `state["access"]` of the request's scope.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeyStore) -> None:
        super().__init__(app)
        self._keys = keys

    def check(self, scope: Scope) -> ErrorInfo | None:
        self._keys.reload_if_changed()
        for key in sent_keys(Headers(scope=scope)):
            found = self._keys.lookup(key)
            if found is not None:
                self._grant(scope, Access(found.owner, found.admin, found.name))
                return None
        self._grant(scope, Access("", sees_all=not self._keys.required))
        if scope["path"] in OPEN_PATHS or not self._keys.required:
            return None
        return ErrorInfo(
            401,
            "authentication_error",
            "API key missing or invalid. Send `Authorization: Bearer KEY` or `x-api-key: KEY`.",
            code="invalid_api_key",
        )

    @staticmethod
    def _grant(scope: Scope, access: Access) -> None:
        scope["state"]["access"] = access
        exchange: HttpExchange = scope["state"]["exchange"]
        exchange.owner, exchange.key = access.owner, access.key_name


class HeadAsGetMiddleware:
    """Answer HEAD as GET; the HTTP server omits the body.

    Clients send HEAD to see whether a server is running before they send a prompt.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            get = {**scope, "method": "GET"}
            await self._app(get, receive, send)
            scope["route"] = get.get("route")
            return
        await self._app(scope, receive, send)


def access_middleware(settings: Settings, keys: ApiKeyStore) -> list[Middleware]:
    """The checks of hosts, origins and keys, outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origin_regex=match_any(settings.cors_origins),
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=("x-request-id", "request-id", "retry-after"),
        max_age=PREFLIGHT_SECONDS,
    )
    return [
        Middleware(HostCheckMiddleware, host=settings.host, allowed=settings.allowed_hosts),
        Middleware(OriginCheckMiddleware, allowed=settings.cors_origins),
        *([cors] if settings.cors_origins else []),
        Middleware(ApiKeyMiddleware, keys=keys),
    ]


def match_any(patterns: Iterable[str]) -> str:
    """Return a regular expression for texts that one of `patterns` matches.

    `*` is any text.
    """
    return "|".join(map(translate, patterns))


def sent_keys(headers: Headers) -> list[bytes]:
    """Return the API keys in a request's headers."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    keys = [key] if scheme.lower() == "bearer" else []
    keys += headers.getlist("x-api-key")
    return [key.strip().encode("latin-1") for key in keys]


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def is_same_origin(origin: str, host: str) -> bool:
    """Whether `origin` is this server, by the name in the Host header `host`."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host
