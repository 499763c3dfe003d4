"""Who may speak to the server: by the name it is called, by the page that asks, and by key.

A browser lets any page send requests to any address. `HostCheck` keeps out pages whose own name
was made to point to this machine (DNS rebinding), `OriginCheck` those of other sites.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from fnmatch import translate
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from glmd.api import webui as page
from glmd.api.auth import ApiKeyStore
from glmd.api.errors import ErrorInfo, respond
from glmd.config import Settings
from glmd.errors import SettingsError

OPEN_PATHS = frozenset({"/livez", "/health", "/api/hello"}) | page.PATHS
"""Answer without a key: a supervisor needs no secret to ask how we are, and the page has to be
there to ask for one."""

HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:@/?#\[\]]+))(?::\d{1,5})?")
"""A Host header (RFC 9110, 7.2): an IPv6 address in brackets or a name, and perhaps a port."""

CONTAINERS = ("host.docker.internal", "host.containers.internal")
"""What containers call the machine that they run on. Nobody can have such a name in public:
`.internal` is reserved (ICANN, 2024)."""

PREFLIGHT_SECONDS = 600
"""For which a browser remembers what a page of another origin may do."""


def require_key_on_public_bind(settings: Settings, keys: ApiKeyStore) -> None:
    """See to it that not everybody in the network gets in by accident.

    Raises:
        SettingsError: the server would be reached from elsewhere, and there is no key.
    """
    if keys.required or settings.allow_unauthenticated or is_loopback(settings.host):
        return
    raise SettingsError(
        f"{settings.host} can be reached from other machines, and there is no API key: make one"
        " with `glmd key create NAME`, or set GLMD_API_KEY, or let everybody in with"
        " --allow-unauthenticated."
    )


def is_loopback(host: str) -> bool:
    """Whether all addresses of `host` are this machine's own; an unknown name has none."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return True  # What listens nowhere is reached by nobody; `listen` says what is wrong.
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def access_rules(settings: Settings, keys: ApiKeyStore) -> list[Middleware]:
    """The middleware of this module, outermost first."""
    rules = [
        Middleware(HostCheck, host=settings.host, allowed=settings.allowed_hosts),
        Middleware(OriginCheck, allowed=settings.cors_origins),
    ]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origin_regex=any_of(settings.cors_origins),
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("x-request-id", "request-id", "retry-after"),
            max_age=PREFLIGHT_SECONDS,
        )
        rules.append(cors)
    return [*rules, Middleware(ApiKey, keys=keys)]


def any_of(patterns: Iterable[str]) -> str:
    """A regular expression of what one of `patterns` matches, in which `*` is any text."""
    return "|".join(map(translate, patterns))


class HostCheck:
    """Answer only to names that can be meant for this server.

    Those are loopback's, the address or name that it listens on, the names that containers have for
    their machine, and those that are allowed. One
    that listens on every address answers to every address, and to this machine's own name: no page
    can have an address for its name and be somebody else's.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str]) -> None:
        """
        Args:
            host: what the server listens on.
            allowed: further names; `*` stands for any text.
        """
        self._app = app
        self._bound = ip_address(host)
        names = ["localhost", *CONTAINERS, host, *allowed]
        if self._bound is not None and self._bound.is_unspecified:
            own = socket.gethostname()
            names += [own, own.partition(".")[0], f"{own.partition('.')[0]}.local"]
        self._names = re.compile(any_of(name.lower() for name in names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Without the header it is no browser: they all send it.
            for host in Headers(scope=scope).getlist("host"):
                if not self._is_ours(host):
                    problem = ErrorInfo(
                        421,
                        "invalid_request_error",
                        f"This server does not answer to the name {host[:100]!r}; the setting"
                        " allowed_hosts says which ones it answers to.",
                        "Host",
                        "host_not_allowed",
                    )
                    await respond(problem, scope)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        parts = HOST.fullmatch(host)
        if parts is None:
            return False
        name = (parts[1] or parts[2]).lower().removesuffix(".")
        address = ip_address(name)
        if address is not None and (address.is_loopback or address == self._bound):
            return True
        if address is not None and self._bound is not None and self._bound.is_unspecified:
            return True
        return self._names.fullmatch(name) is not None


class OriginCheck:
    """Refuse what a page of another site asks for, unless that site is allowed.

    A browser sends `Origin` with every request that could do something, and with every one whose
    answer a page of another site could read.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        """
        Args:
            allowed: origins such as `https://chat.example.org`; `*` stands for any text.
        """
        self._app = app
        self._allowed = re.compile(any_of(allowed) or r"(?!)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "").lower()
            for origin in headers.getlist("origin"):
                if not (is_same_origin(origin, host) or self._allowed.fullmatch(origin)):
                    problem = ErrorInfo(
                        403,
                        "permission_error",
                        f"Pages of {origin[:100]!r} may not use this server; the setting"
                        " cors_origins says which ones may.",
                        "Origin",
                        "origin_not_allowed",
                    )
                    await respond(problem, scope)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


class ApiKey:
    """Let nobody in without a key, except to `OPEN_PATHS`; say whose key it was.

    The key's name is `state["key_name"]` of the request's scope.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeyStore) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_enter(scope):
            problem = ErrorInfo(
                401,
                "authentication_error",
                "This server wants an API key: send it as `Authorization: Bearer KEY`, or as"
                " `x-api-key: KEY`.",
                code="invalid_api_key",
            )
            await respond(problem, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        self._keys.reload_if_changed()
        for guess in sent_keys(scope):
            name = self._keys.lookup(guess)
            if name is not None:
                scope["state"]["key_name"] = name
                return True
        return scope["path"] in OPEN_PATHS or not self._keys.required


def sent_keys(scope: Scope) -> list[bytes]:
    headers = Headers(scope=scope)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    sent = [key] if scheme.lower() == "bearer" else []
    sent += headers.getlist("x-api-key")
    return [each.strip().encode("latin-1") for each in sent]


def ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def is_same_origin(origin: str, host: str) -> bool:
    """Whether an origin is the server's own page, as the `Host` header names the server."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host
