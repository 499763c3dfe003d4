"""`GET /`: a page for the browser, with a chat and what the server is doing.

The files of this folder, as they are: no build step, nothing fetched from elsewhere. They hold no
data, so they need no key; the page asks for one when the routes that it calls do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Text of the model or of a client cannot become markup, whatever the scripts do.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "Cache-Control": "no-cache",  # Ask whether it has changed, so that an update shows at once.
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

INDEX = "index.html"

FILES = {
    file.name: file.read_bytes()
    for file in sorted(Path(__file__).parent.iterdir())
    if file.suffix in TYPES
}
"""Read once: they are a few kilobytes, and do not change under a running server."""

PATHS = frozenset({"/", *(f"/page/{name}" for name in FILES if name != INDEX)})
"""What is answered here."""


@router.get("/")
async def page(request: Request) -> Response:
    return answer(request, INDEX)


@router.get("/page/{name}")
async def part(name: str, request: Request) -> Response:
    if request.url.path not in PATHS:
        raise HTTPException(404)
    return answer(request, name)


def answer(request: Request, name: str) -> Response:
    """A file, or 304 for a browser that has it already."""
    content = FILES[name]
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])
