"""Measure the longest pause of the event loop while a large JSON body is served.

    python benchmarks/body_stall.py [MIB ...]

Streams stand still during a pause. `inline` parses every body on the event loop, without limits on
the number of values; `glmd` is `glmd.api.request_body` as it is. Both send the same bodies to
routes that need no engine, and report the longest pause of the whole request: reading, parsing,
validation and the route.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator

import httpx

from glmd.api import request_body
from glmd.api.app import create_app
from glmd.api.state import AppState, ServedModel
from glmd.checkpoint.hub import DEMO
from glmd.config import Settings
from glmd.engine_client.process import EngineProcessConfig

MIB = 1 << 20
CHUNK = 1 << 16
TICK = 0.001

COUNT_TOKENS = "/v1/messages/count_tokens"

BODIES: dict[str, tuple[str, bytes, bytes, bytes]] = {
    "one text": (COUNT_TOKENS, b'{"messages":[{"role":"user","content":"', b"A line.\\n", b'"}]}'),
    "messages of 4 KiB": (
        COUNT_TOKENS,
        b'{"messages":[{"role":"user","content":"Hello."}',
        b',{"role":"user","content":"' + b"Some text. " * 370 + b'"}',
        b"]}",
    ),
    "short messages": (
        COUNT_TOKENS,
        b'{"messages":[{"role":"user","content":"Hello."}',
        b',{"role":"user","content":"Hello."}',
        b"]}",
    ),
    "distinct keys": (COUNT_TOKENS, b'{"messages":[]', b',"%07x":0', b"}"),
    "empty arrays": (COUNT_TOKENS, b'{"messages":[]', b",[]", b"]}"),
    "token ids": ("/detokenize", b'{"tokens":[1', b",100321", b"]}"),
    "invalid token ids": ("/detokenize", b'{"tokens":[1', b",0.5", b"]}"),
    "escaped surrogates": (
        COUNT_TOKENS,
        b'{"messages":[{"role":"user","content":"\\ud800',
        b"\\ud83d\\ude00",
        b'"}]}',
    ),
}
"""Path, start, repeated unit and end of a body."""


def build_body(start: bytes, unit: bytes, end: bytes, size: int) -> bytes:
    count = (size - len(start) - len(end)) // len(unit % 0 if b"%" in unit else unit)
    if b"%" in unit:
        return start + b"".join(unit % number for number in range(count)) + end
    if start.endswith(b"[]"):
        return start[:-1] + unit[1:] + unit * (count - 1) + end
    return start + unit * count + end


async def send(app: object, path: str, body: bytes) -> tuple[float, float, int]:
    """Return the longest pause, the duration of the request, and the status."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK)
            longest = max(longest, time.perf_counter() - before - TICK)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), CHUNK):
            yield body[start : start + CHUNK]
            await asyncio.sleep(0)

    headers = {"content-type": "application/json", "content-length": str(len(body))}
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        watcher = asyncio.create_task(watch())
        await asyncio.sleep(10 * TICK)
        longest, started = 0.0, time.perf_counter()
        response = await client.post(path, content=chunks(), headers=headers, timeout=None)
        seconds = time.perf_counter() - started
        await asyncio.sleep(2 * TICK)  # Let the watcher see a pause at the end.
        watcher.cancel()
    return longest, seconds, response.status_code


async def main(sizes: list[int]) -> None:
    model = ServedModel.of("glmd-demo", DEMO)
    state = AppState(Settings(port=0), model, EngineProcessConfig(DEMO, {}))
    app = create_app(state)
    print(f"{'body':20} {'MiB':>4}   {'inline':^26}   {'glmd':^26}")
    for name, (path, start, unit, end) in BODIES.items():
        for size in sizes:
            body = build_body(start, unit, end, size * MIB)
            cells = []
            for inline_bytes in (sys.maxsize, request_body.INLINE_BYTES):
                original, request_body.INLINE_BYTES = request_body.INLINE_BYTES, inline_bytes
                gc.collect()
                pause, seconds, status = await send(app, path, body)
                request_body.INLINE_BYTES = original
                cells.append(f"{pause * 1e3:6.0f} ms in {seconds:5.2f} s: {status}")
            print(f"{name:20} {size:4}   {cells[0]:26}   {cells[1]:26}", flush=True)
    await state.close()


if __name__ == "__main__":
    asyncio.run(main([int(argument) for argument in sys.argv[1:]] or [1, 8, 32]))
