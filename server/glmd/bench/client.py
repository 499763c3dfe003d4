"""The HTTP benchmark's client: asynchronous, streaming, and exact about when what arrived."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from glmd.bench.scenarios import TEMPLATE_SETTINGS, Conversation, Scenario

_PATIENCE = httpx.Timeout(900.0, connect=60.0)
"""Seconds; a CPU may take minutes for what a GPU does in one."""

_TEXT_KEYS = ("content", "reasoning_content", "reasoning")


@dataclass(slots=True)
class Reply:
    """One streamed answer. Times in seconds of one monotonic clock."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """When each chunk with text or a tool call came."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ended: float = 0.0
    error: str | None = None
    message: dict[str, Any] = field(default_factory=dict)
    """The answer as an assistant message, to be sent back with the next turn."""


@dataclass(slots=True)
class Recording:
    """All answers of one run of a scenario, by conversation."""

    replies: list[list[Reply]]
    seconds: float
    """From the first request to the last byte."""


async def play(url: str, model: str, scenario: Scenario) -> Recording:
    """Have all conversations of a scenario at once, each on connections of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE, limits=limits) as client:
        start = time.perf_counter()
        replies = await asyncio.gather(
            *(_converse(client, model, talk) for talk in scenario.conversations)
        )
        return Recording(list(replies), time.perf_counter() - start)


async def _converse(client: httpx.AsyncClient, model: str, talk: Conversation) -> list[Reply]:
    messages: list[dict[str, Any]] = []
    if talk.system is not None:
        messages.append({"role": "system", "content": talk.system})
    replies: list[Reply] = []
    for text in talk.turns:
        calls = messages[-1].get("tool_calls") if messages else None
        if calls:
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": text} for call in calls
            ]
        else:
            messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "max_tokens": talk.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": TEMPLATE_SETTINGS,
        }
        if talk.tools:
            body["tools"] = talk.tools
        reply = Reply(time.perf_counter())
        replies.append(reply)
        with _errors_noted(reply):
            await _ask(client, body, reply)
        reply.ended = time.perf_counter()
        if reply.error is not None:
            break
        messages.append(reply.message)
    return replies


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], reply: Reply) -> None:
    """Send one request and read its stream into `reply`."""
    answer = _Answer()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            await response.aread()
            response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            if usage := chunk.get("usage"):
                details = usage.get("prompt_tokens_details") or {}
                reply.prompt_tokens = usage["prompt_tokens"]
                reply.completion_tokens = usage["completion_tokens"]
                reply.cached_tokens = details.get("cached_tokens", 0)
            for choice in chunk["choices"]:
                if answer.add(choice["delta"]):
                    reply.arrivals.append(time.perf_counter())
    if not reply.completion_tokens:
        raise ValueError("the stream ended without usage")
    reply.message = answer.message()


class _Answer:
    """Folds deltas into a message."""

    def __init__(self) -> None:
        self._content = ""
        self._reasoning = ""
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, delta: dict[str, Any]) -> bool:
        """Take one delta in; whether there was anything in it."""
        self._content += delta.get("content") or ""
        self._reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
        calls = delta.get("tool_calls") or []
        for part in calls:
            index = part.get("index", len(self._calls))
            call = self._calls.setdefault(
                index,
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] += part.get("id") or ""
            for key, text in part["function"].items():
                call["function"][key] += text or ""
        return bool(calls) or any(delta.get(key) for key in _TEXT_KEYS)

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message["tool_calls"] = [self._calls[i] for i in sorted(self._calls)]
        return message


@contextmanager
def _errors_noted(reply: Reply) -> Iterator[None]:
    """What goes wrong with one request is counted, and does not end the benchmark."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        reply.error = f"HTTP {error.response.status_code}: {error.response.text[:200]}"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        reply.error = f"{type(error).__name__}: {error}"
