"""Per-client lock for rendering, tokenizing and compiling grammars."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from live import LiveServer
from requests_by_path import body_of, error_of, wait_until

from glmd.api.context import client_id
from glmd.api.state import PerClientLock

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_client_waits_for_at_most_one_job_of_another_client() -> None:
    lock = PerClientLock()
    worker = asyncio.Lock()
    done: list[str] = []

    async def work(client: str) -> None:
        async with lock.acquire(client), worker:
            await asyncio.sleep(0)
            done.append(client)

    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(work("flood"))
        await asyncio.sleep(0)
        for client in ("a", "b"):
            group.create_task(work(client))
    assert set(done[:5]) == {"flood", "a", "b"}
    assert len(done) == 102
    assert not len(lock)


async def test_a_cancelled_wait_leaves_no_lock() -> None:
    lock = PerClientLock()
    async with lock.acquire("a"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0), lock.acquire("a"):
                pass
        assert len(lock) == 1
    assert not len(lock)
    async with lock.acquire("a"):
        pass


@contextmanager
def busy(live: LiveServer, authorization: str) -> Iterator[None]:
    """Hold the client's lock in the block."""
    begun, over = threading.Event(), threading.Event()
    scope: Any = {
        "type": "http",
        "state": {},
        "client": ("127.0.0.1", 1),
        "headers": [(b"authorization", authorization.encode())],
    }

    async def hold() -> None:
        async with live.service.client_lock.acquire(client_id(scope)):
            begun.set()
            await asyncio.to_thread(over.wait)

    supervision = live.service.engine._supervision
    assert supervision is not None
    held = asyncio.run_coroutine_threadsafe(hold(), supervision.get_loop())
    assert begun.wait(20)
    try:
        yield
    finally:
        over.set()
        held.result(20)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("x-glmd-queue-timeout", (503, "overloaded_error")),
        ("x-glmd-timeout", (504, "timeout_error")),
    ],
)
def test_timeouts_apply_while_a_prompt_waits_for_preparation(
    scripted: LiveServer, header: str, expected: tuple[int, str]
) -> None:
    path = "/v1/chat/completions"
    with busy(scripted, "Bearer slow"), scripted.client() as http:
        mine = http.post(
            path, json=body_of(path, "Hi"), headers={header: "0.2", "authorization": "Bearer slow"}
        )
        assert error_of(path, mine) == expected
        other = http.post(path, json=body_of(path, "</think>Hi"))
        assert other.status_code == 200, "another client is not held up"
    assert not scripted.service.engine.queue.sequences


def test_nothing_is_prepared_for_a_disconnected_client(
    scripted: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = scripted.service
    prepared = []
    build_prompt: Callable[..., Any] = service.build_prompt

    async def note(*arguments: Any) -> Any:
        prepared.append(arguments)
        return await build_prompt(*arguments)

    monkeypatch.setattr(service, "build_prompt", note)
    body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Authorization: Bearer gone\r\n\r\n"
    )
    host, port = scripted.url.removeprefix("http://").split(":")
    connections = scripted.server.server_state.connections
    before = len(connections)
    with busy(scripted, "Bearer gone"):
        with socket.create_connection((host, int(port))) as opened:
            opened.sendall(head.encode() + body)
            wait_until(lambda: service.engine.queue.sequences == 1)
        wait_until(lambda: len(connections) <= before)
    wait_until(lambda: not service.engine.queue.sequences)
    assert not prepared
