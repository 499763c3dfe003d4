"""Timeouts of connections whose clients are silent or slow."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer, live_server

from glmd.api import server
from glmd.api.request_body import INLINE_EXPANSION

TIMEOUT = 1.0
"""Limit in seconds that silent clients exceed, and that others keep on a busy machine."""


@pytest.fixture(scope="module")
def hasty() -> Iterator[LiveServer]:
    """A server with short timeouts."""
    with live_server(header_timeout=TIMEOUT, body_timeout=TIMEOUT, reader_timeout=TIMEOUT) as live:
        yield live


def connect(live: LiveServer, *, receive_buffer: int | None = None) -> socket.socket:
    opened = socket.socket()
    if receive_buffer is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    opened.settimeout(20)
    host, port = live.url.removeprefix("http://").split(":")
    opened.connect((host, int(port)))
    return opened


def everything(opened: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    data = b""
    try:
        while chunk := opened.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def drip(opened: socket.socket, data: bytes) -> bytes:
    """Send single bytes until the server answers; return the answer."""
    opened.settimeout(TIMEOUT / 8)
    for byte in data:
        try:
            opened.sendall(bytes([byte]))
            if (answer := opened.recv(65536)) or answer == b"":
                opened.settimeout(20)
                return answer + everything(opened)
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
    raise AssertionError("no answer from the server")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_connections(live: LiveServer) -> int:
    return len(live.server.server_state.connections)


def request(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps({"model": "default"} | body).encode()
    return head(path, len(data)) + data


def head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


GET = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def test_a_silent_connection_is_closed(hasty: LiveServer) -> None:
    with connect(hasty) as opened:
        assert everything(opened) == b""
    wait_until(lambda: not open_connections(hasty))


def is_alive(opened: socket.socket) -> bool:
    """Send a request and read its response; the connection stays open."""
    opened.sendall(GET)
    data = b""
    while not data.endswith(b"}"):
        data += opened.recv(65536)
    return b'"alive"' in data


@pytest.mark.parametrize("before", [False, True])
def test_incomplete_headers_are_408_and_the_end(hasty: LiveServer, before: bool) -> None:
    """On a new connection and on a connection with an earlier request."""
    with connect(hasty) as opened:
        if before:
            assert is_alive(opened)
        opened.sendall(GET[:20])
        answer = everything(opened)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout_error"


def test_slow_headers_do_not_extend_the_timeout(hasty: LiveServer) -> None:
    with connect(hasty) as opened:
        answer = drip(opened, b"GET /livez HTTP/1.1\r\nX: " + b"x" * 200)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_an_incomplete_body_is_408_and_the_end(hasty: LiveServer, path: str) -> None:
    with connect(hasty) as opened:
        opened.sendall(head(path, 1000) + b'{"model":')
        answer = everything(opened)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert "did not arrive within 1 s" in body["error"]["message"]
    assert body.get("type") == ("error" if path == "/v1/messages" else None)


def test_a_slow_body_does_not_extend_the_timeout(hasty: LiveServer) -> None:
    with connect(hasty) as opened:
        opened.sendall(head("/v1/chat/completions", 1000))
        assert drip(opened, b" " * 200).startswith(b"HTTP/1.1 408 ")


def test_the_rest_of_a_refused_body_is_not_awaited(hasty: LiveServer) -> None:
    with connect(hasty) as opened:
        opened.sendall(head("/v1/chat/completions", 10**9))
        assert opened.recv(65536).startswith(b"HTTP/1.1 413 ")
        drip(opened, b" " * 200)
    wait_until(lambda: not open_connections(hasty))


def test_an_idle_connection_stays_open(hasty: LiveServer) -> None:
    """Longer than every timeout for silent clients."""
    with connect(hasty) as opened, connect(hasty) as other:
        assert is_alive(opened)
        assert everything(other) == b""
        assert is_alive(opened)


def long_answer(**fields: Any) -> bytes:
    """A request whose response has a few megabytes of log-probabilities."""
    script = f"⟦</think>{'word ' * 700}⟧"
    messages = [{"role": "user", "content": script}]
    return request({"messages": messages, "logprobs": True, "top_logprobs": 20, **fields})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_stops_reading_is_disconnected_without_leftovers(
    hasty: LiveServer, stream: bool
) -> None:
    fds = open_files()
    with connect(hasty, receive_buffer=4096) as opened:
        opened.sendall(long_answer(stream=stream))
        wait_until(lambda: open_connections(hasty) == 1)
        wait_until(lambda: open_connections(hasty) == 0)
        wait_until(lambda: not hasty.service.engine.in_flight)
    hasty.wait_until_idle()
    wait_until(lambda: open_files() <= fds)


def test_a_slow_reader_gets_the_whole_response(hasty: LiveServer) -> None:
    data = b""
    begin = time.monotonic()
    with connect(hasty, receive_buffer=4096) as opened:
        opened.sendall(long_answer(stream=True))
        while b"[DONE]" not in data[-100:]:
            chunk = opened.recv(4096)
            assert chunk, "cut"
            data += chunk
            # Slower than the server writes, for longer than it waits for a reader.
            if time.monotonic() - begin < 3 * TIMEOUT:
                time.sleep(TIMEOUT / 40)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0


def test_clients_that_disconnect_in_any_phase_leave_no_task(hasty: LiveServer) -> None:
    engine = hasty.service.engine

    def tasks() -> int:
        return len(asyncio.all_tasks(hasty.loop))

    waits, runs = (
        {"messages": [{"role": "user", "content": f"⟦{script}⟧"}], "max_tokens": 4000}
        for script in ("{wait}", "</think>Hello{wait}")
    )
    phases = [
        (b"", b""),
        (GET[:20], b""),
        (request(waits)[:-5], b""),
        (request(waits), b""),
        (request(waits | {"stream": True}), b""),
        (request(runs | {"stream": True}), b"Hello"),
    ]
    wait_until(lambda: not open_connections(hasty))
    # The first stream leaves a task that watches for the server's end, once and for all.
    for number in range(3):
        if number == 1:
            before = tasks()
        with ExitStack() as stack:
            for data, until in phases * 5:
                stack.enter_context(opened := connect(hasty))
                opened.sendall(data)
                seen = b""
                while until not in seen:
                    seen += opened.recv(65536)
        wait_until(lambda: not open_connections(hasty) and not engine.in_flight)
    wait_until(lambda: tasks() <= before)
    hasty.wait_until_idle()
    assert not engine.queue.sequences
    assert not engine.queue.tokens


def test_connections_beyond_the_limit_are_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "connection_limit", lambda: 3)
    with live_server() as live:
        wait_until(lambda: not open_connections(live))
        held = [connect(live) for _ in range(3)]
        wait_until(lambda: open_connections(live) == 3)
        with connect(live) as opened:
            answer = everything(opened)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        assert is_alive(held[0]), "those that were there are served"
        held.pop().close()
        wait_until(lambda: open_connections(live) == 2)
        with connect(live) as opened:
            assert is_alive(opened)
        for each in held:
            each.close()


def test_bodies_beyond_the_memory_for_bodies_are_503(tmp_path: Path) -> None:
    """One client can hold half of the memory; other clients still find memory."""
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("one\nother\n")
    fields = {"padding": " " * 1500}
    waits = request({"messages": [{"role": "user", "content": "⟦{wait}⟧"}]} | fields)
    hello = request({"messages": [{"role": "user", "content": "⟦</think>Hi⟧"}]} | fields)
    waits, hello, hello_of_another = (
        sent.replace(b"Host:", b"Authorization: Bearer " + key + b"\r\nHost:", 1)
        for sent, key in ((waits, b"one"), (hello, b"one"), (hello, b"other"))
    )
    # Half of the memory holds ten such bodies, each with what it takes once it is parsed.
    with live_server(max_body=2048 * (1 + INLINE_EXPANSION), api_key_file=keys) as live:

        def answer(sent: bytes) -> bytes:
            with connect(live) as opened:
                opened.sendall(sent)
                return opened.recv(65536)

        with ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(opened := connect(live))
                opened.sendall(waits)
            wait_until(lambda: live.service.engine.queue.sequences == 10)
            refusal = answer(hello)
            assert refusal.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: 1\r\n" in refusal.lower()
            assert answer(hello_of_another).startswith(b"HTTP/1.1 200 ")
        live.wait_until_idle()
        assert answer(hello).startswith(b"HTTP/1.1 200 ")
