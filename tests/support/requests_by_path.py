"""Requests to the scripted engine, by the path of an API."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {},
    "/v1/completions": {"max_tokens": 100},
    "/v1/responses": {},
    "/v1/messages": {"max_tokens": 100, "thinking": {"type": "enabled", "budget_tokens": 1024}},
}


def body_of(path: str, script: str, **fields: Any) -> dict[str, Any]:
    """A request of any API whose answer is `script`."""
    text = f"⟦{script}⟧"
    field = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    said = [{"role": "user", "content": text}] if field == "messages" else text
    return {"model": "default", field: said, **PATHS[path], **fields}


def error_of(path: str, response: httpx.Response) -> tuple[int, str]:
    """Status and type of an error, in the shape of its API."""
    body = response.json()
    if path == "/v1/messages":
        assert body["type"] == "error"
    return response.status_code, body["error"]["type"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
