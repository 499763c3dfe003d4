"""Whose request it is: the clients that take turns and share what there is."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import Scope


def client_id(scope: Scope) -> str:
    """Who takes turns with others: the program or person at an address, and the key it sends.

    Both, because a household may share a key, and the programs of one machine an address. Where no
    key is asked for, one that is sent all the same still tells programs apart.
    """
    headers = Headers(scope=scope)
    sent = headers.get("x-api-key") or headers.get("authorization", "")
    key = scope["state"].get("key_name", sent)  # Only one of those sent need be valid.
    address = scope["client"][0] if scope.get("client") else ""
    return hashlib.sha256(f"{address} {key}".encode()).hexdigest()[:16]


async def get_client(request: Request) -> str:
    """FastAPI dependency: whose request it is."""
    return client_id(request.scope)


GivenClient = Annotated[str, Depends(get_client)]
