"""Web page at `/` (chat, status), and the reference of the API at `/docs`.

Serves the files of this folder without a build step; the page loads nothing from other servers. The
files hold no data, so they need no API key. The page asks for a key when a route requires one.
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
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self'",
        "manifest-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Scripts cannot turn text of the model or of a client into markup.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "Cache-Control": "no-cache",  # Revalidate, so that an update takes effect at once.
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

INDEX = "index.html"
DOCS = "docs.html"

FILES = {
    file.name: file.read_bytes()
    for file in sorted(Path(__file__).parent.iterdir())
    if file.suffix in TYPES
}

PATHS = frozenset(
    {"/", "/docs", *(f"/page/{name}" for name in FILES if not name.endswith(".html"))}
)
"""Paths of the page and its files."""


@router.get("/")
async def get_page(request: Request) -> Response:
    return file_response(request, INDEX)


@router.get("/docs")
async def get_docs(request: Request) -> Response:
    return file_response(request, DOCS)


@router.get("/page/{name}")
async def get_file(name: str, request: Request) -> Response:
    if request.url.path not in PATHS:
        raise HTTPException(404)
    return file_response(request, name)


def file_response(request: Request, name: str) -> Response:
    """Return a file, or 304 if the browser has the current version."""
    content = FILES[name]
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])
