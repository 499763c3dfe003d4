"""Power assertion: held while requests run, by one process, and released afterwards."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from live import live_server

from glmd.api import power
from glmd.api.observability.request_stats import HttpExchange, RequestRegistry
from glmd.api.power import IdleSleepBlocker
from glmd.ipc import EngineRequest, pack_tokens

LONG = 60.0
"""A grace period that no test outlives, in seconds."""


class Caffeinate:
    """Stand-in that records process id and arguments of each call, then runs until killed."""

    def __init__(self, folder: Path, end: str = "exec sleep 600") -> None:
        self.path = folder / "caffeinate"
        self._calls = folder / "calls"
        self.path.write_text(f'#!/bin/sh\necho "$$ $*" >> "{self._calls}"\n{end}\n')
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[tuple[int, str]]:
        """Process id and arguments of each call."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [(int(pid), arguments) for pid, _, arguments in (x.partition(" ") for x in lines)]

    @property
    def running(self) -> list[int]:
        """Ids of processes that exist, zombies included."""
        return [pid for pid, _ in self.calls if exists(pid)]


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def caffeinate(tmp_path: Path) -> Caffeinate:
    return Caffeinate(tmp_path)


def blocker(
    registry: RequestRegistry, program: str | Path | None, grace: float, *, enabled: bool = True
) -> IdleSleepBlocker:
    return IdleSleepBlocker(
        registry, lambda: enabled, None if program is None else str(program), grace
    )


ids = map(str, count())


@contextmanager
def request(registry: RequestRegistry) -> Iterator[None]:
    exchange = HttpExchange("x", "POST", "/v1/chat/completions", "")
    exchange.set_request("chat", None, stream=False)
    stats = registry.record(exchange, EngineRequest(id=next(ids), prompt=pack_tokens([1, 2])))
    with registry.in_flight(stats):
        yield


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_one_process_holds_for_overlapping_requests_and_ends_after_the_grace(
    caffeinate: Caffeinate,
) -> None:
    registry = RequestRegistry()
    it = blocker(registry, caffeinate.path, 0.2)
    with request(registry):
        with request(registry):
            await wait_until(lambda: caffeinate.calls)
        with request(registry):
            await asyncio.sleep(0.4)  # Twice the grace period: only requests count.
        assert len(caffeinate.running) == 1
    assert len(caffeinate.running) == 1
    await wait_until(lambda: not caffeinate.running)
    assert [arguments for _, arguments in caffeinate.calls] == [f"-i -w {os.getpid()}"]
    with request(registry):
        await wait_until(lambda: caffeinate.running)
    await it.close()
    assert len(caffeinate.calls) == 2


@pytest.mark.anyio
async def test_requests_within_the_grace_share_a_process_which_shutdown_ends(
    caffeinate: Caffeinate,
) -> None:
    registry = RequestRegistry()
    it = blocker(registry, caffeinate.path, LONG)
    for _ in range(3):
        with request(registry):
            await wait_until(lambda: caffeinate.calls)
        await asyncio.sleep(0.01)
    assert len(caffeinate.running) == len(caffeinate.calls) == 1
    await it.close()
    assert not caffeinate.running


@pytest.mark.anyio
async def test_shutdown_ends_the_process_while_a_request_runs(caffeinate: Caffeinate) -> None:
    registry = RequestRegistry()
    it = blocker(registry, caffeinate.path, LONG)
    with request(registry):
        await wait_until(lambda: caffeinate.calls)
        await it.close()
        assert not caffeinate.running


@pytest.mark.anyio
@pytest.mark.parametrize("supported", [True, False])
async def test_no_process_if_turned_off_or_on_another_platform(
    caffeinate: Caffeinate, supported: bool
) -> None:
    registry = RequestRegistry()
    it = blocker(registry, caffeinate.path if supported else None, 0, enabled=not supported)
    with request(registry):
        await asyncio.sleep(0.2)
    await it.close()
    assert not caffeinate.calls


@pytest.mark.anyio
@pytest.mark.parametrize("problem", ["No such file or directory", "exit status 3"])
async def test_failures_are_logged_once_and_no_request_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    failing = Caffeinate(tmp_path, "exit 3")
    exits = problem.startswith("exit")
    program = failing.path if exits else tmp_path / "missing"
    registry = RequestRegistry()
    it = blocker(registry, program, 0.01)
    with caplog.at_level(logging.WARNING, "glmd"):
        while not caplog.records or (exits and len(failing.calls) < 3):
            with request(registry):
                await asyncio.sleep(0.01)
                if exits:
                    await wait_until(lambda: failing.calls and not failing.running)
            await asyncio.sleep(0.02)
        await it.close()
    (record,) = caplog.records
    assert problem in record.getMessage()
    assert str(program) in record.getMessage()
    assert {stats.finish for stats in registry.recent} == {"stop"}


@pytest.mark.parametrize("prevent_sleep", [True, False])
def test_a_server_blocks_sleep_for_background_responses_too(
    caffeinate: Caffeinate, monkeypatch: pytest.MonkeyPatch, prevent_sleep: bool
) -> None:
    monkeypatch.setattr(power, "PROGRAM", str(caffeinate.path))
    with (
        live_server(prevent_sleep=prevent_sleep, config={"step_seconds": 0.05}) as live,
        live.client() as http,
    ):
        assert not caffeinate.calls
        body = {"input": "⟦</think>one two three⟧", "background": True}
        id = http.post("/v1/responses", json=body).json()["id"]
        deadline = time.monotonic() + 20
        while http.get(f"/v1/responses/{id}").json()["status"] != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(caffeinate.running) == int(prevent_sleep)
    assert not caffeinate.running
