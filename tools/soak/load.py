"""Clients at work, and an account of what became of every request."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import visits
from visits import Visit

Outcome = Literal["completed", "refused", "failed", "left", "wrong"]
"""How a request ended: answered whole; refused with a reason; begun, and failed with a reason,
because the engine died; left by its client; or in a way in which none may end."""

HEADERS = {"content-type": "application/json"}

PATIENCE = 300.0
"""Seconds after which a client counts an answer as lost."""

RETRY_AFTER = 1.0
"""Seconds for which a client that was refused waits, at most."""

LEFT_BEFORE = 0.3
"""Seconds in which a client may leave that does not even wait for the answer's beginning."""


@dataclass
class Account:
    """What became of the requests.

    Attributes:
        counts: by kind and outcome.
        reasons: of refusals, failures, and what is wrong.
        tokens: that completed plain requests have generated.
        told: the longest time from a death of the engine to the end of a request that was in
            flight then, in seconds.
    """

    counts: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    reasons: Counter[tuple[Outcome, str]] = field(default_factory=Counter)
    tokens: int = 0
    told: float = 0.0
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
        account: of all requests that have ended.
        pending: requests that have not.
    """

    def __init__(self, url: str, seed: int) -> None:
        self.account = Account()
        self.pending: set[asyncio.Task[None]] = set()
        self._url = url
        self._rng = random.Random(seed)
        self._rests: dict[asyncio.Task[Any] | None, float] = {}
        """By request that has ended, the seconds that its client was told to wait."""
        self._http: httpx.AsyncClient

    async def run(self, work: Callable[[Load], Any], workers: int, until: float) -> None:
        """Let `workers` clients do `work` over and over; the last ones end in their own time."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=workers)
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, limits=limits) as http:
            self._http = http

            async def worker() -> None:
                while time.monotonic() < until:
                    task = asyncio.create_task(work(self))
                    self.pending.add(task)
                    await asyncio.wait([task])
                    self.pending.discard(task)
                    task.result()
                    await asyncio.sleep(min(self._rests.pop(task, 0.0), RETRY_AFTER))

            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(worker())

    async def plain(self) -> None:
        await self._ask(visits.plain(self._rng))

    async def anything(self) -> None:
        """What any client might do, faults included."""
        chance = self._rng.random()
        if chance < 0.12:
            await self._leave(visits.mixed(self._rng))
        elif chance < 0.2:
            await self._malformed()
        elif chance < 0.23:
            await self._half_a_body()
        elif chance < 0.3:
            await self._ask(visits.quick(self._rng))
        elif chance < 0.4:
            await self.canary()
        else:
            await self._ask(visits.mixed(self._rng))

    async def canary(self) -> None:
        """A request whose answer must always be the same."""
        visit = Visit("canary", "/v1/chat/completions", visits.CANARY)
        answer = await self._ask(visit)
        if answer is not None:
            message = json.loads(answer)["choices"][0]["message"]
            self.account.canaries[json.dumps([message.get("reasoning_content"), message])] += 1

    async def _ask(self, visit: Visit) -> bytes | None:
        """Send a request and read all of the answer, which is returned if it is whole."""
        try:
            response = await self._http.post(
                visit.path, content=visits.encoded(visit), headers=HEADERS
            )
        except httpx.HTTPError as error:
            self.account.note(visit.kind, "wrong", f"{visit.path}: {type(error).__name__} {error}")
            return None
        outcome, reason = judge(visit, response)
        self.account.note(visit.kind, outcome, reason)
        if "retry-after" in response.headers:
            self._rests[asyncio.current_task()] = float(response.headers["retry-after"])
        if outcome == "completed" and visit.kind == "plain":
            self.account.tokens += visit.body["max_tokens"]
        return response.content if outcome == "completed" else None

    async def _leave(self, visit: Visit) -> None:
        """Go away in the midst of a stream, or before the answer has begun."""
        if not visit.stream:
            try:
                async with asyncio.timeout(self._rng.uniform(0, LEFT_BEFORE)):
                    await self._ask(visit)
            except TimeoutError:
                self.account.note(visit.kind, "left")
            return
        pieces = self._rng.randrange(6)
        try:
            async with self._http.stream(
                "POST", visit.path, content=visits.encoded(visit), headers=HEADERS
            ) as response:
                async for _ in response.aiter_raw():
                    pieces -= 1
                    if pieces < 0:
                        break
        except httpx.HTTPError as error:
            self.account.note(visit.kind, "wrong", f"{visit.path}: {type(error).__name__} {error}")
            return
        self.account.note(visit.kind, "left")

    async def _malformed(self) -> None:
        body = self._rng.choice([*visits.MALFORMED, self._rng.randbytes(200)])
        path = "/v1/chat/completions"
        try:
            response = await self._http.post(path, content=body, headers=HEADERS)
        except httpx.HTTPError as error:
            self.account.note("malformed", "wrong", f"{type(error).__name__} {error}")
            return
        refused = 400 <= response.status_code < 500 or unavailable(response)
        outcome: Outcome = "refused" if refused else "wrong"
        self.account.note("malformed", outcome, f"status {response.status_code}")

    async def _half_a_body(self) -> None:
        """Announce a thousand bytes, send ten, and hang up."""
        url = httpx.URL(self._url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(
            b"POST /v1/messages HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            b'content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"messages'
        )
        await writer.drain()
        await asyncio.sleep(self._rng.uniform(0, LEFT_BEFORE))
        writer.close()
        await writer.wait_closed()
        self.account.note("half a body", "left")


def judge(visit: Visit, response: httpx.Response) -> tuple[Outcome, str]:
    """How a request ended, and why."""
    if response.status_code != httpx.codes.OK:
        return judge_refusal(visit, response)
    if not visit.stream:
        return "completed", ""
    try:
        *_, (name, last) = events(response.content)
    except ValueError as error:
        return "wrong", f"{visit.path}: {error}"
    whole = name in ("message_stop", "response.completed", "response.incomplete")
    if whole or last == "[DONE]":
        return "completed", ""
    body = json.loads(last)
    failure = body.get("error") or body.get("response", {}).get("error")
    if failure is None:
        return "wrong", f"{visit.path}: a stream that ends with {last[:80]}"
    return "failed", str(failure["message"])


def judge_refusal(visit: Visit, response: httpx.Response) -> tuple[Outcome, str]:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "wrong", f"{visit.path}: status {response.status_code} without an error"
    if unavailable(response):
        return ("failed" if "while it worked" in message else "refused"), message
    if response.status_code in (422, 429, 529):
        return "refused", message
    return "wrong", f"{visit.path}: status {response.status_code}: {message}"


def unavailable(response: httpx.Response) -> bool:
    return response.status_code in (503, 529)


def events(body: bytes) -> list[tuple[str, str]]:
    """The name and the data of each event of a stream.

    Raises:
        ValueError: it is no such stream.
    """
    if not body.endswith(b"\n\n"):
        raise ValueError("a stream that is cut off within an event")
    found = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = "", None
        for line in block.split("\n"):
            key, colon, value = line.partition(": ")
            if not colon or key not in ("", "event", "data"):
                raise ValueError(f"no server-sent event: {line[:80]!r}")
            if key == "event":
                name = value
            elif key == "data":
                data = value
        if data is not None:
            found.append((name, data))
    if not found:
        raise ValueError("a stream without events")
    return found
