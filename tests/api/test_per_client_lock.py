"""Per-client lock for rendering, tokenizing and compiling grammars."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from live import LiveServer, live_server
from requests_by_path import body_of, error_of, wait_until

from glmd.api.auth import Access, create_key
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


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, str, str]]:
    """A server, and two keys of it."""
    store = tmp_path_factory.mktemp("keys") / "keys.json"
    first, second = (create_key(store, name) for name in ("first", "second"))
    with live_server(keys=store) as live:
        yield live, first, second


@contextmanager
def busy(live: LiveServer, key: str) -> Iterator[None]:
    """Hold the client's lock in the block."""
    begun, over = threading.Event(), threading.Event()
    found = live.service.keys.lookup(key.encode())
    assert found is not None
    access = Access(found.owner, sees_all=False)
    scope: Any = {"type": "http", "state": {"access": access}, "client": ("127.0.0.1", 1)}

    async def hold() -> None:
        async with live.service.client_lock.acquire(client_id(scope)):
            begun.set()
            await asyncio.to_thread(over.wait)

    held = asyncio.run_coroutine_threadsafe(hold(), live.loop)
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
    keyed: tuple[LiveServer, str, str], header: str, expected: tuple[int, str]
) -> None:
    path = "/v1/chat/completions"
    live, slow, quick = keyed
    with busy(live, slow), live.client() as http:
        mine = http.post(path, json=body_of(path, "Hi"), headers={header: "0.2", "x-api-key": slow})
        assert error_of(path, mine) == expected
        body = body_of(path, "</think>Hi")
        other = http.post(path, json=body, headers={"x-api-key": quick})
        assert other.status_code == 200, "another client is not held up"
    assert not live.service.engine.queue.sequences


def test_a_made_up_key_makes_no_new_client(scripted: LiveServer) -> None:
    """Otherwise a client without a key could take the turns of many."""

    def scope(*headers: tuple[bytes, bytes], address: str = "127.0.0.1") -> Any:
        access = Access("", sees_all=True)
        return {"state": {"access": access}, "client": (address, 1), "headers": headers}

    plain = client_id(scope())
    assert client_id(scope((b"authorization", b"Bearer x"), (b"x-api-key", b"y"))) == plain
    assert client_id(scope(address="127.0.0.2")) != plain


def test_nothing_is_prepared_for_a_disconnected_client(
    keyed: tuple[LiveServer, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, key, _ = keyed
    service = live.service
    prepared = []
    build_prompt: Callable[..., Any] = service.build_prompt

    async def note(*arguments: Any, **options: Any) -> Any:
        prepared.append(arguments)
        return await build_prompt(*arguments, **options)

    monkeypatch.setattr(service, "build_prompt", note)
    body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: Bearer {key}\r\n\r\n"
    )
    host, port = live.url.removeprefix("http://").split(":")
    connections = live.server.server_state.connections
    before = len(connections)
    with busy(live, key):
        with socket.create_connection((host, int(port))) as opened:
            opened.sendall(head.encode() + body)
            wait_until(lambda: service.engine.queue.sequences == 1)
        wait_until(lambda: len(connections) <= before)
    wait_until(lambda: not service.engine.queue.sequences)
    assert not prepared
