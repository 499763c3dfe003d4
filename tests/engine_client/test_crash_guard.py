"""Isolation, quarantine and clearing of requests that were in flight during a crash."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import fake_engine
import pytest

from glmd.engine_client import client as engine_client
from glmd.engine_client import crash_guard
from glmd.engine_client.client import EngineClient
from glmd.engine_client.crash_guard import EXPIRY, MARGIN, CrashGuard, TrackedRequest
from glmd.engine_client.process import EngineProcessConfig
from glmd.errors import EngineUnavailable, GlmdError, Overloaded, RequestQuarantined
from glmd.ipc import EngineRequest, SamplingParams, pack_tokens

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def request(token: int, id: str = "r", **fields: object) -> EngineRequest:
    return EngineRequest(id=id, prompt=pack_tokens([token]), **fields)  # type: ignore[arg-type]


class Clients:
    """Requests in flight, all of which end when the engine dies."""

    def __init__(self) -> None:
        self.now = 0.0
        self.guard = CrashGuard(lambda: self.now)
        self._open: dict[str, tuple[AsyncExitStack, TrackedRequest]] = {}
        self.starting: dict[str, asyncio.Task[None]] = {}
        self.errors: dict[str, GlmdError] = {}

    async def send(self, *requests: EngineRequest) -> None:
        """Send requests; each may have to wait for isolation."""
        for request in requests:
            self.starting[request.id] = asyncio.create_task(self._start(request))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _start(self, request: EngineRequest) -> None:
        stack = AsyncExitStack()
        self.errors.pop(request.id, None)
        try:
            tracked = await stack.enter_async_context(self.guard.track(request))
        except GlmdError as error:
            self.errors[request.id] = error
            return
        self._open[request.id] = stack, tracked

    @property
    def running(self) -> set[str]:
        return set(self._open)

    async def advance(self, id: str, tokens: int) -> None:
        self.guard.advance(self._open[id][1], tokens)
        await self._settle()

    async def leave(self, id: str, *, completed: bool = True) -> None:
        stack, tracked = self._open.pop(id)
        if completed:
            self.guard.clear(tracked)
        await stack.aclose()
        await self._settle()

    async def die(self) -> None:
        self.guard.engine_died()
        self.guard.fail_waiting("dead")
        for id in list(self._open):
            await self.leave(id, completed=False)

    async def _settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


async def test_a_request_that_crashes_the_engine_twice_alone_is_quarantined_until_expiry() -> None:
    clients = Clients()
    for _ in range(2):
        await clients.send(request(1))
        assert clients.running == {"r"}
        await clients.die()
    await clients.send(request(1, "other id", priority=5), request(2, "other work"))
    assert isinstance(clients.errors["other id"], RequestQuarantined)
    assert clients.running == {"other work"}
    clients.now += EXPIRY + 1
    await clients.send(request(1, "later"))
    assert "later" in clients.running


async def test_of_many_resent_requests_only_the_crashing_one_is_quarantined() -> None:
    clients = Clients()
    requests = [request(token, str(token)) for token in range(9)]
    crashing = "4"
    await clients.send(*requests)
    assert len(clients.running) == 9
    await clients.advance("7", 100)
    await clients.die()
    await clients.send(*requests)
    for id in "0123":
        assert max(clients.running) == id
        await clients.advance(id, MARGIN + 1)
    assert clients.running == set("01234")
    await clients.die()
    await clients.send(*requests)
    assert isinstance(clients.errors[crashing], RequestQuarantined)
    for id in "01235678":
        assert max(clients.running) == id
        await clients.advance(id, 200)
    assert clients.running == set("01235678")


async def test_isolation_ends_beyond_the_recorded_tokens_or_when_the_request_ends() -> None:
    clients = Clients()
    requests = [request(token, str(token)) for token in range(4)]
    await clients.send(*requests)
    await clients.advance("0", 50)
    await clients.die()
    await clients.send(*requests, request(9, "fresh"))
    assert clients.running == {"0", "fresh"}
    await clients.advance("0", 50 + MARGIN)
    assert clients.running == {"0", "fresh"}
    await clients.advance("0", 1)
    assert clients.running == {"0", "fresh", "1"}
    await clients.leave("1")
    assert clients.running == {"0", "fresh", "2"}
    await clients.leave("2", completed=False)
    assert clients.running == {"0", "fresh", "3"}


async def test_a_completed_request_loses_its_record() -> None:
    clients = Clients()
    for _ in range(5):
        await clients.send(request(1))
        await clients.die()
        await clients.send(request(1))
        await clients.leave("r")


async def test_waiting_requests_fail_with_the_engine_and_count_no_crash() -> None:
    clients = Clients()
    requests = [request(token, str(token)) for token in range(3)]
    await clients.send(*requests)
    await clients.die()
    await clients.send(*requests)
    await clients.die()
    assert isinstance(clients.errors["1"], EngineUnavailable)
    await clients.send(*requests)
    assert isinstance(clients.errors["0"], RequestQuarantined)
    assert clients.running == {"1"}


async def test_a_timeout_during_the_wait_fails_that_request_and_the_next_one_starts() -> None:
    clients = Clients()
    requests = [request(token, str(token)) for token in range(3)]
    await clients.send(*requests)
    await clients.die()
    await clients.send(*requests)
    clients.guard.withdraw("1", Overloaded("too late"))
    await clients.leave("0")
    assert isinstance(clients.errors["1"], Overloaded)
    assert clients.running == {"2"}


async def test_a_request_cancelled_during_the_wait_does_not_block_the_next_one() -> None:
    clients = Clients()
    requests = [request(token, str(token)) for token in range(3)]
    await clients.send(*requests)
    await clients.die()
    await clients.send(*requests)
    clients.starting["1"].cancel()
    await clients.leave("0")
    assert clients.running == {"2"}


async def test_sampling_distinguishes_requests_and_the_number_of_records_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crash_guard, "CAPACITY", 3)
    clients = Clients()
    for _ in range(2):
        await clients.send(request(1, sampling=SamplingParams(seed=1)))
        await clients.die()
    await clients.send(request(1, sampling=SamplingParams(seed=2)))
    assert clients.running == {"r"}
    await clients.leave("r")
    await clients.send(*(request(token, str(token)) for token in range(10)))
    await clients.die()
    await clients.send(*(request(token, str(token)) for token in range(10)))
    assert len(clients.running) == 7 + 1, "three have a record, of which one runs"


async def test_the_client_rejects_a_quarantined_request_and_serves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "MIN_RESTART_DELAY", 0.01)
    client = EngineClient(EngineProcessConfig(tmp_path, {}, engine="fake_engine"))
    await client.start()
    try:
        for _ in range(2):
            await client.wait_for("ready")
            with pytest.raises(EngineUnavailable):
                await anext(client.generate(request(fake_engine.DIE, "crashing")))
        await client.wait_for("ready")
        with pytest.raises(RequestQuarantined, match="crashed 2 times"):
            await anext(client.generate(request(fake_engine.DIE, "crashing")))
        assert client.in_flight == 0
        served = await anext(client.generate(request(5, "harmless")))
        assert set(served.tokens) == {5}
        assert client.restarts == 2
    finally:
        await client.close()
