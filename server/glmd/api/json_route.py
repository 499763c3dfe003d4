"""A route whose JSON body is parsed strictly: no NaN, bounded nesting, text that is text."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # two that are a pair
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})"  # one that lacks the other
    rb"|.)",
    re.DOTALL,
)
"""An escape within a JSON string; a lone surrogate is the group."""


class JsonRequest(Request):
    async def json(self) -> Any:
        """The body's value.

        Half a surrogate pair becomes U+FFFD. Agents cut what tools print without regard for
        pairs, and send it with every request from then on: refused, the conversation were over.

        Raises:
            HTTPException: 400, with the place of the mistake.
        """
        body = await self.body()
        try:
            try:
                return parse(body)
            except ValueError:
                mended = without_lone_surrogates(body)
                if mended == body:
                    raise
                return parse(mended)
        except ValueError as error:
            raise HTTPException(400, f"The body is not valid JSON: {error}.") from error


def parse(body: bytes) -> Any:
    """
    Raises:
        ValueError: not JSON.
    """
    return pydantic_core.from_json(body, allow_inf_nan=False)


def without_lone_surrogates(body: bytes) -> bytes:
    """JSON text with U+FFFD for each escape of a surrogate that has no partner."""
    return ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], body)


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json
