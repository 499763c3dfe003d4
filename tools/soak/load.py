"""Clients that send random requests and classify the outcome of each."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import traffic
from traffic import ClientRequest

Outcome = Literal["completed", "refused", "failed", "left", "wrong"]
"""completed: complete answer. refused: error before the start. failed: error later, because the
engine crashed. left: the client disconnected. wrong: anything else."""

HEADERS = {"content-type": "application/json"}

CLIENT_TIMEOUT = 300.0
"""Seconds after which a request counts as lost."""

MAX_RETRY_AFTER = 1.0
"""Maximum seconds that a refused client waits."""

MAX_STAY = 0.3
"""Maximum seconds before a client leaves without waiting for the response."""


@dataclass
class Outcomes:
    """Outcomes of all requests.

    Attributes:
        counts: number of requests by kind and outcome.
        reasons: number of requests by outcome and reason.
        tokens: tokens generated for completed plain requests.
        failure_latency: maximum seconds from a crash of the engine to the end of a request that
            was in flight.
        canaries: number of canary requests by answer.
    """

    counts: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    reasons: Counter[tuple[Outcome, str]] = field(default_factory=Counter)
    tokens: int = 0
    failure_latency: float = 0.0
    canaries: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, outcome: Outcome, reason: str = "") -> None:
        self.counts[kind, outcome] += 1
        if reason:
            self.reasons[outcome, reason] += 1

    def total(self, outcome: Outcome) -> int:
        return sum(count for (_, which), count in self.counts.items() if which == outcome)


class Load:
    """Clients of one server.

    Attributes:
        outcomes: outcomes of all requests that have ended.
        pending: requests that have not ended.
    """

    def __init__(self, url: str, seed: int, keys: Sequence[str]) -> None:
        self.outcomes = Outcomes()
        self.pending: set[asyncio.Task[None]] = set()
        self._url = url
        self._keys = keys
        self._rng = random.Random(seed)
        self._retry_after: dict[asyncio.Task[Any] | None, float] = {}
        """Seconds from the Retry-After header, by request."""
        self._http: httpx.AsyncClient

    async def run(
        self, work: Callable[[Load], Any], workers: int, goes_on: Callable[[], bool]
    ) -> None:
        """Run `work` repeatedly in `workers` clients while `goes_on` holds, then finish."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=workers)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=CLIENT_TIMEOUT, limits=limits
        ) as http:
            self._http = http

            async def worker() -> None:
                while goes_on():
                    task = asyncio.create_task(work(self))
                    self.pending.add(task)
                    await asyncio.wait([task])
                    self.pending.discard(task)
                    task.result()
                    await asyncio.sleep(min(self._retry_after.pop(task, 0.0), MAX_RETRY_AFTER))

            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(worker())

    async def plain(self) -> None:
        await self._ask(traffic.plain(self._rng))

    async def anything(self) -> None:
        """Send any kind of request, faulty ones included."""
        chance = self._rng.random()
        if chance < 0.12:
            await self._leave(traffic.mixed(self._rng))
        elif chance < 0.16:
            await self._hostile()
        elif chance < 0.22:
            await self._malformed()
        elif chance < 0.24:
            await self._half_a_body()
        elif chance < 0.3:
            await self._ask(traffic.quick(self._rng))
        elif chance < 0.4:
            await self.canary()
        else:
            await self._ask(traffic.mixed(self._rng))

    async def complete_canary(self) -> None:
        """Send the canary until it is answered."""
        deadline = time.monotonic() + CLIENT_TIMEOUT
        while not await self.canary():
            if time.monotonic() > deadline:
                raise TimeoutError(f"The canary had no answer for {CLIENT_TIMEOUT:.0f} s.")
            await asyncio.sleep(MAX_RETRY_AFTER)

    async def canary(self) -> bool:
        """Send a request whose answer must always be the same; return whether it was answered."""
        request = ClientRequest("canary", "/v1/chat/completions", traffic.CANARY)
        answer = await self._ask(request)
        if answer is not None:
            message = json.loads(answer)["choices"][0]["message"]
            self.outcomes.canaries[json.dumps([message.get("reasoning_content"), message])] += 1
        return answer is not None

    async def _ask(self, request: ClientRequest) -> bytes | None:
        """Send a request and read the answer; return a complete answer, else None."""
        try:
            response = await self._http.post(
                request.path, content=traffic.encode(request), headers=self._headers()
            )
        except httpx.HTTPError as error:
            self.outcomes.note(
                request.kind, "wrong", f"{request.path}: {type(error).__name__} {error}"
            )
            return None
        outcome, reason = judge(request, response)
        self.outcomes.note(request.kind, outcome, reason)
        if "retry-after" in response.headers:
            self._retry_after[asyncio.current_task()] = float(response.headers["retry-after"])
        if outcome == "completed" and request.kind == "plain":
            self.outcomes.tokens += request.body["max_tokens"]
        return response.content if outcome == "completed" else None

    async def _leave(self, request: ClientRequest) -> None:
        """Disconnect during a stream, or before the response."""
        if not request.stream:
            try:
                async with asyncio.timeout(self._rng.uniform(0, MAX_STAY)):
                    await self._ask(request)
            except TimeoutError:
                self.outcomes.note(request.kind, "left")
            return
        pieces = self._rng.randrange(6)
        try:
            async with self._http.stream(
                "POST", request.path, content=traffic.encode(request), headers=self._headers()
            ) as response:
                async for _ in response.aiter_raw():
                    pieces -= 1
                    if pieces < 0:
                        break
        except httpx.HTTPError as error:
            self.outcomes.note(
                request.kind, "wrong", f"{request.path}: {type(error).__name__} {error}"
            )
            return
        self.outcomes.note(request.kind, "left")

    async def _hostile(self) -> None:
        await self._refused("hostile", *self._rng.choice(traffic.HOSTILE))

    async def _malformed(self) -> None:
        body = self._rng.choice([*traffic.MALFORMED, self._rng.randbytes(200)])
        await self._refused("malformed", "/v1/chat/completions", body)

    async def _refused(self, kind: str, path: str, body: bytes) -> None:
        """Send a body that must be refused, or answered without harm."""
        try:
            response = await self._http.post(path, content=body, headers=self._headers())
        except httpx.HTTPError as error:
            self.outcomes.note(kind, "wrong", f"{type(error).__name__} {error}")
            return
        status = response.status_code
        outcome: Outcome = "refused" if 400 <= status < 500 or unavailable(response) else "wrong"
        if kind == "hostile" and status == httpx.codes.OK:
            outcome = "completed"
        self.outcomes.note(kind, outcome, f"status {status}")

    def _headers(self) -> dict[str, str]:
        return {**HEADERS, "x-api-key": self._rng.choice(self._keys)}

    async def _half_a_body(self) -> None:
        """Announce 1,000 bytes of body, send ten, and disconnect."""
        url = httpx.URL(self._url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        key = self._rng.choice(self._keys).encode()
        writer.write(
            b"POST /v1/messages HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: " + key + b"\r\n"
            b'content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"messages'
        )
        await writer.drain()
        await asyncio.sleep(self._rng.uniform(0, MAX_STAY))
        writer.close()
        await writer.wait_closed()
        self.outcomes.note("half a body", "left")


def judge(request: ClientRequest, response: httpx.Response) -> tuple[Outcome, str]:
    """Return the outcome of a request, and the reason."""
    if response.status_code != httpx.codes.OK:
        return judge_refusal(request, response)
    if not request.stream:
        return "completed", ""
    try:
        *_, (name, last) = events(response.content)
    except ValueError as error:
        return "wrong", f"{request.path}: {error}"
    whole = name in ("message_stop", "response.completed", "response.incomplete")
    if whole or last == "[DONE]":
        return "completed", ""
    body = json.loads(last)
    failure = body.get("error") or body.get("response", {}).get("error")
    if failure is None:
        return "wrong", f"{request.path}: the stream ends with {last[:80]}"
    return "failed", str(failure["message"])


def judge_refusal(request: ClientRequest, response: httpx.Response) -> tuple[Outcome, str]:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "wrong", f"{request.path}: status {response.status_code} without an error"
    if unavailable(response):
        return ("failed" if "while it was processing" in message else "refused"), message
    if response.status_code in (422, 429, 529):
        return "refused", message
    return "wrong", f"{request.path}: status {response.status_code}: {message}"


def unavailable(response: httpx.Response) -> bool:
    return response.status_code in (503, 529)


def events(body: bytes) -> list[tuple[str, str]]:
    """Return name and data of each event of a stream.

    Raises:
        ValueError: the body is not a complete event stream.
    """
    if not body.endswith(b"\n\n"):
        raise ValueError("the stream ends within an event")
    found = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = "", None
        for line in block.split("\n"):
            key, colon, value = line.partition(": ")
            if not colon or key not in ("", "event", "data"):
                raise ValueError(f"not a server-sent event: {line[:80]!r}")
            if key == "event":
                name = value
            elif key == "data":
                data = value
        if data is not None:
            found.append((name, data))
    if not found:
        raise ValueError("the stream has no events")
    return found
