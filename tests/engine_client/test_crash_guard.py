"""Requests under which the engine died: who is tried, who is refused, and who is let go."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import fake_engine
import pytest

from glmd.engine_client import client as engine_client
from glmd.engine_client import crash_guard as suspects
from glmd.engine_client.client import EngineClient
from glmd.engine_client.crash_guard import MARGIN, MEMORY, CrashGuard, TrackedRequest
from glmd.engine_client.process import EngineProcessConfig
from glmd.errors import CrashesEngine, EngineUnavailable, GlmdError, Overloaded
from glmd.ipc import EngineRequest, SamplingParams, pack_tokens

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def request(token: int, id: str = "r", **fields: object) -> EngineRequest:
    return EngineRequest(id=id, prompt=pack_tokens([token]), **fields)  # type: ignore[arg-type]


class Clients:
    """Requests in flight, which go when the engine dies."""

    def __init__(self) -> None:
        self.now = 0.0
        self.suspects = CrashGuard(lambda: self.now)
        self._open: dict[str, tuple[AsyncExitStack, TrackedRequest]] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}
        self.errors: dict[str, GlmdError] = {}

    async def send(self, *requests: EngineRequest) -> None:
        """Send requests, each of which may have to wait."""
        for one in requests:
            self._coming[one.id] = asyncio.create_task(self._enter(one))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _enter(self, one: EngineRequest) -> None:
        stack = AsyncExitStack()
        self.errors.pop(one.id, None)
        try:
            case = await stack.enter_async_context(self.suspects.track(one))
        except GlmdError as error:
            self.errors[one.id] = error
            return
        self._open[one.id] = stack, case

    @property
    def running(self) -> set[str]:
        return set(self._open)

    async def advance(self, id: str, tokens: int) -> None:
        self.suspects.advance(self._open[id][1], tokens)
        await self._settle()

    async def leave(self, id: str, *, well: bool = True) -> None:
        stack, case = self._open.pop(id)
        if well:
            self.suspects.clear(case)
        await stack.aclose()
        await self._settle()

    async def die(self) -> None:
        self.suspects.engine_died()
        self.suspects.fail_waiting("dead")
        for id in list(self._open):
            await self.leave(id, well=False)

    async def _settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


async def test_one_that_kills_the_engine_alone_twice_is_refused_for_a_while() -> None:
    them = Clients()
    for _ in range(2):
        await them.send(request(1))
        assert them.running == {"r"}
        await them.die()
    await them.send(request(1, "other id", priority=5), request(2, "other work"))
    assert isinstance(them.errors["other id"], CrashesEngine)
    assert them.running == {"other work"}
    them.now += MEMORY + 1
    await them.send(request(1, "later"))
    assert "later" in them.running


async def test_of_many_that_come_back_only_the_one_that_kills_is_refused() -> None:
    them = Clients()
    crowd = [request(token, str(token)) for token in range(9)]
    killer = "4"
    await them.send(*crowd)
    assert len(them.running) == 9
    await them.advance("7", 100)
    await them.die()
    await them.send(*crowd)
    for id in "0123":
        assert max(them.running) == id
        await them.advance(id, MARGIN + 1)
    assert them.running == set("01234")
    await them.die()
    await them.send(*crowd)
    assert isinstance(them.errors[killer], CrashesEngine)
    for id in "01235678":
        assert max(them.running) == id
        await them.advance(id, 200)
    assert them.running == set("01235678")


async def test_a_suspect_is_off_trial_beyond_its_place_or_when_it_leaves_however() -> None:
    them = Clients()
    crowd = [request(token, str(token)) for token in range(4)]
    await them.send(*crowd)
    await them.advance("0", 50)
    await them.die()
    await them.send(*crowd, request(9, "fresh"))
    assert them.running == {"0", "fresh"}
    await them.advance("0", 50 + MARGIN)
    assert them.running == {"0", "fresh"}
    await them.advance("0", 1)
    assert them.running == {"0", "fresh", "1"}
    await them.leave("1")
    assert them.running == {"0", "fresh", "2"}
    await them.leave("2", well=False)
    assert them.running == {"0", "fresh", "3"}


async def test_one_that_ended_by_itself_starts_anew() -> None:
    them = Clients()
    for _ in range(5):
        await them.send(request(1))
        await them.die()
        await them.send(request(1))
        await them.leave("r")


async def test_those_that_wait_fail_with_the_engine_and_are_not_counted() -> None:
    them = Clients()
    crowd = [request(token, str(token)) for token in range(3)]
    await them.send(*crowd)
    await them.die()
    await them.send(*crowd)
    await them.die()
    assert isinstance(them.errors["1"], EngineUnavailable)
    await them.send(*crowd)
    assert isinstance(them.errors["0"], CrashesEngine)
    assert them.running == {"1"}


async def test_one_whose_deadline_passes_while_it_waits_is_told_so_and_the_next_goes_on() -> None:
    them = Clients()
    crowd = [request(token, str(token)) for token in range(3)]
    await them.send(*crowd)
    await them.die()
    await them.send(*crowd)
    them.suspects.withdraw("1", Overloaded("too late"))
    await them.leave("0")
    assert isinstance(them.errors["1"], Overloaded)
    assert them.running == {"2"}


async def test_a_client_that_leaves_while_it_waits_holds_nobody_up() -> None:
    them = Clients()
    crowd = [request(token, str(token)) for token in range(3)]
    await them.send(*crowd)
    await them.die()
    await them.send(*crowd)
    them._coming["1"].cancel()
    await them.leave("0")
    assert them.running == {"2"}


async def test_sampling_and_grammar_tell_requests_apart_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suspects, "CAPACITY", 3)
    them = Clients()
    for _ in range(2):
        await them.send(request(1, sampling=SamplingParams(seed=1)))
        await them.die()
    await them.send(request(1, sampling=SamplingParams(seed=2)))
    assert them.running == {"r"}
    await them.leave("r")
    await them.send(*(request(token, str(token)) for token in range(10)))
    await them.die()
    assert len(them.suspects._records) == 3


async def test_the_client_refuses_what_killed_the_engine_twice_and_serves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "SHORTEST_PAUSE", 0.01)
    client = EngineClient(EngineProcessConfig(tmp_path, {}, engine="fake_engine"))
    await client.start()
    try:
        for _ in range(2):
            await client.wait_for("ready")
            with pytest.raises(EngineUnavailable):
                await anext(client.generate(request(fake_engine.DIE, "killer")))
        await client.wait_for("ready")
        with pytest.raises(CrashesEngine, match="died 2 times"):
            await anext(client.generate(request(fake_engine.DIE, "killer")))
        assert client.in_flight == 0
        served = await anext(client.generate(request(5, "innocent")))
        assert set(served.tokens) == {5}
        assert client.restarts == 2
    finally:
        await client.close()
