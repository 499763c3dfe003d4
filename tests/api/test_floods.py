"""Floods against a server process and its engine process: what they leave, and whom they disturb.

All of it from outside: files and threads from the system, rows from the engine's own counters, and
a canary: a stream with a fixed seed that must give the same tokens as before anyone came.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from glmd.api.sockets import raise_file_limit

pytestmark = pytest.mark.anyio

CONNECTIONS = 1000
STREAMS = 200

CHAT = "/v1/chat/completions"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Flooded:
    """A server process.

    Attributes:
        processes: its own and its engine's.
        tokens: what the canary said when it was alone.
    """

    port: int
    processes: list[psutil.Process]
    tokens: list[int]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=300)

    def status(self) -> dict[str, Any]:
        with self.client() as http:
            status: dict[str, Any] = http.get("/glmd/status").json()
        return status

    def holdings(self) -> list[tuple[int, int]]:
        """Files and threads of each process."""
        return [(process.num_fds(), process.num_threads()) for process in self.processes]

    def at_rest(self) -> bool:
        status = self.status()
        stats = status["engine"]["stats"]
        return not status["running"] and not stats["running"] and not stats["waiting"]

    def canary(self) -> list[int]:
        """The tokens of one stream."""
        tokens: list[int] = []
        body = canary_body()
        with self.client() as http, http.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        tokens += choice.get("token_ids") or []
        assert line.startswith("data: [DONE]") or not line
        return tokens

    def connect(self) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        return asyncio.open_connection("127.0.0.1", self.port)


def body_of(seed: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": "default",
        "messages": [{"role": "user", "content": f"Flood {seed}"}],
        "seed": seed,
        "temperature": 1.0,
        "max_tokens": 8,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        **fields,
    }


def canary_body() -> dict[str, Any]:
    return body_of(7, max_tokens=40, messages=[{"role": "user", "content": "Sing."}])


def http_request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


GET = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def server(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flooded]:
    """A server whose timeouts no complete request meets, however loaded the machine is."""
    with flooded_server(random_checkpoint, tmp_path_factory.mktemp("floods"), 300) as flooded:
        yield flooded


@pytest.fixture(scope="module")
def short_timeouts(
    random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flooded]:
    """A server that closes incomplete requests after a few seconds."""
    with flooded_server(random_checkpoint, tmp_path_factory.mktemp("floods"), 5) as flooded:
        yield flooded


@contextmanager
def flooded_server(checkpoint: Path, folder: Path, timeout: int) -> Iterator[Flooded]:
    raise_file_limit()
    log = folder / "log"
    names = ("GLMD_HEADER_TIMEOUT", "GLMD_BODY_TIMEOUT", "GLMD_READER_TIMEOUT")
    timeouts = dict.fromkeys(names, str(timeout))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "glmd", "serve", str(checkpoint), "--port", "0"],
            stderr=out,
            env=os.environ | timeouts,
        )
    try:
        wait(lambda: "http://" in log.read_text())
        port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", log.read_text())[0])
        flooded = Flooded(port, [], [])
        wait(lambda: flooded.status()["engine"]["state"] == "ready")
        engine = flooded.status()["engine"]["pid"]
        flooded.processes = [psutil.Process(process.pid), psutil.Process(engine)]
        flooded.tokens = flooded.canary()
        assert len(flooded.tokens) == 40
        yield flooded
    finally:
        process.terminate()
        process.wait(120)
    assert process.returncode == 0
    assert "Traceback" not in log.read_text(), log.read_text()


def wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def leaving_nothing(server: Flooded) -> Iterator[None]:
    """After the block, files and threads are as before, and no sequence runs."""
    wait(server.at_rest)
    before = server.holdings()
    yield
    wait(server.at_rest)
    # Threads of pools stay: as many as there are at most, not as many as there were connections.
    wait(
        lambda: all(
            fds <= old_fds and threads <= old_threads + 4
            for (fds, threads), (old_fds, old_threads) in zip(
                server.holdings(), before, strict=True
            )
        )
    )


@asynccontextmanager
async def undisturbed(server: Flooded) -> AsyncIterator[None]:
    """Run a seeded stream repeatedly during the block; its tokens must not change."""
    over = False
    runs = 0

    async def repeat() -> None:
        nonlocal runs
        while not over or not runs:
            assert await asyncio.to_thread(server.canary) == server.tokens
            runs += 1

    repeating = asyncio.create_task(repeat())
    try:
        yield
    finally:
        over = True
        await repeating


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def test_a_thousand_silent_connections_disturb_no_stream(
    short_timeouts: Flooded,
) -> None:
    server = short_timeouts
    with leaving_nothing(server):
        async with undisturbed(server):
            opened = await asyncio.gather(*(server.connect() for _ in range(CONNECTIONS)))
            for index, (_, writer) in enumerate(opened):
                writer.write(GET[: index % 20])  # Of every kind: nothing, or half a head.
            answers = await asyncio.gather(*(read_all(reader) for reader, _ in opened))
        for _, writer in opened:
            writer.close()
    assert all(answer == b"" or b" 408 " in answer for answer in answers)


async def test_a_thousand_connections_at_once_are_all_answered(server: Flooded) -> None:
    request = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    def send() -> socket.socket:
        """Connect and send at once, so that a slow test machine is no slow client."""
        opened = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        opened.sendall(request)
        opened.setblocking(False)
        return opened

    async def receive(opened: socket.socket) -> bytes:
        reader, writer = await asyncio.open_connection(sock=opened)
        answer = await read_all(reader)
        writer.close()
        return answer

    with leaving_nothing(server):
        async with undisturbed(server):
            opened = [send() for _ in range(CONNECTIONS)]
            answers = await asyncio.gather(*map(receive, opened))
    assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers)


async def test_two_hundred_streams_all_complete(server: Flooded) -> None:
    async def stream(seed: int) -> str:
        reader, writer = await server.connect()
        writer.write(http_request(body_of(seed)).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = await read_all(reader)
        writer.close()
        return answer.decode()

    def ids(answer: str) -> list[str]:
        return re.findall(r'"token_ids":\[([\d,]+)\]', answer)

    with leaving_nothing(server):
        alone = [ids(await stream(seed)) for seed in (0, 1)]
        async with undisturbed(server):
            answers = await asyncio.gather(*(stream(seed) for seed in range(STREAMS)))
    assert all("data: [DONE]" in answer for answer in answers)
    # A chunk may bring several ids, and how many is chance.
    together = [",".join(ids(answer)) for answer in answers[:2]]
    assert together == [",".join(each) for each in alone]


async def test_incomplete_bodies_time_out(short_timeouts: Flooded) -> None:
    server = short_timeouts
    whole = http_request(body_of(1))
    with leaving_nothing(server):
        async with undisturbed(server):
            opened = await asyncio.gather(*(server.connect() for _ in range(STREAMS)))
            for index, (_, writer) in enumerate(opened):
                writer.write(whole[: len(whole) - 1 - index])
            answers = await asyncio.gather(*(read_all(reader) for reader, _ in opened))
        for _, writer in opened:
            writer.close()
    assert all(b" 408 Request Timeout" in answer for answer in answers)


async def open_only(server: Flooded) -> None:
    _, writer = await server.connect()
    vanish(writer)


async def send(server: Flooded, data: bytes, until: bytes = b"") -> None:
    """Send, optionally wait for data, and disconnect."""
    reader, writer = await server.connect()
    writer.write(data)
    await writer.drain()
    if until:
        try:
            await reader.readuntil(until)
        except asyncio.IncompleteReadError as error:
            raise AssertionError(error.partial) from error
    vanish(writer)


def vanish(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, as a killed process does."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


LONG = [{"role": "user", "content": "word " * 400}]

PHASES: dict[str, Callable[[Flooded, int], Awaitable[None]]] = {
    "connected": lambda server, _: open_only(server),
    "in the head": lambda server, _: send(server, GET[:20]),
    "in the body": lambda server, seed: send(server, http_request(body_of(seed))[:-9]),
    "queued, streamed": lambda server, seed: send(
        server, http_request(body_of(seed, max_tokens=500))
    ),
    "queued, whole": lambda server, seed: send(
        server, http_request(body_of(seed, max_tokens=500, stream=False))
    ),
    "in the prefill": lambda server, seed: send(
        server,
        http_request(body_of(seed, messages=LONG, return_progress=True, cache_salt=f"{seed}")),
        until=b"prompt_progress",
    ),
    "while streaming": lambda server, seed: send(
        server, http_request(body_of(seed, max_tokens=500)), until=b"token_ids"
    ),
}


async def test_clients_that_disconnect_in_any_phase_leave_no_resources(server: Flooded) -> None:
    with leaving_nothing(server):
        async with undisturbed(server):
            # All of them at once, more than there are places in the engine: some wait.
            await asyncio.gather(
                *(leave(server, seed) for leave in PHASES.values() for seed in range(6))
            )
