"""Two ranks of which either dies, hangs or disagrees, in each phase of their work."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import pytest
import sse
from live import LiveServer, live_server

from glmd.engine_client import client as engine_client

TIMEOUT = 300.0
"""Seconds for anything on a machine under heavy load."""

Phase = Literal["prefill", "decode"]


class Group:
    """A server whose engine is two ranks."""

    def __init__(self, live: LiveServer, http: httpx.Client) -> None:
        self.rank_0: psutil.Process
        self.rank_1: psutil.Process
        self._engine = live.service.engine
        self._http = http
        self._restarts = 0
        """Groups that were lost."""

    def find(self) -> None:
        """Wait for the processes of a group that starts."""
        wait_until(lambda: self._engine.pid is not None)
        self.rank_0 = psutil.Process(self._engine.pid)
        wait_until(self.rank_0.children)
        (self.rank_1,) = self.rank_0.children()

    def wait_until_joined(self) -> None:
        """Wait until the ring is connected, and the ranks load their parts."""
        for rank in (self.rank_0, self.rank_1):
            wait_until(partial(is_joined, rank))

    def wait_until_blocked(self) -> None:
        """Wait until rank 0 waits in a collective, and does nothing else."""
        wait_until(lambda: self._engine.stalled)

    def wait_until_lost(self) -> None:
        """Wait until both ranks have ended. The front answers meanwhile."""
        self._restarts += 1
        wait_until(lambda: self._engine.restarts == self._restarts)
        for rank in (self.rank_0, self.rank_1):
            wait_until(partial(has_ended, rank))
        assert self._http.get("/livez").status_code == 200

    def answer(self) -> str:
        """A greedy answer, once the group is ready."""
        wait_until(lambda: self._engine.state == "ready")
        self.find()
        response = self._http.post("/v1/chat/completions", json=chat("abc", 24))
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    @contextmanager
    def request(self, phase: Phase, number: int) -> Iterator[None]:
        """A request that is in a phase when the block begins, and ends with an error behind it."""
        # Each is another, since one that crashes twice is quarantined.
        words = 600 if phase == "prefill" else 2
        body = chat(f"{number} " + "word " * words, 3000, stream=True, return_progress=True)
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            chunks = response.iter_raw()
            received = next(chunks)
            while phase == "decode" and received.count(b'"content":') < 5:
                received += next(chunks)
            yield
            received += b"".join(chunks)
        events = sse.read(received)
        assert not events.done
        assert events.chunks[-1]["error"]["code"] == "engine_unavailable"
        begun = any(
            chunk["choices"] and chunk["choices"][0]["delta"].get("content")
            for chunk in events.chunks[:-1]
        )
        assert begun == (phase == "decode")


def chat(text: str, tokens: int, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": text}],
        "enable_thinking": False,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        **fields,
    }


def is_joined(rank: psutil.Process) -> bool:
    """Whether a rank has its three connections: two of the ring, and that of plans."""
    found = rank.net_connections("tcp")
    return bool(sum(each.status == psutil.CONN_ESTABLISHED for each in found) == 3)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, though whoever inherits it may not have noticed."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_rank_0(group: Group) -> None:
    group.rank_0.kill()


def kill_rank_1(group: Group) -> None:
    group.rank_1.kill()


def kill_rank_1_in_collective(group: Group) -> None:
    group.rank_1.suspend()
    group.wait_until_blocked()
    group.rank_1.kill()


def kill_rank_0_in_collective(group: Group) -> None:
    group.rank_1.suspend()
    group.wait_until_blocked()
    group.rank_0.kill()
    group.rank_1.resume()


def hang_rank_1(group: Group) -> None:
    group.rank_1.suspend()


def disagree(group: Group) -> None:
    group.rank_0.send_signal(signal.SIGUSR1)


def load_and_kill_rank_1(group: Group) -> None:
    group.wait_until_joined()
    group.rank_1.kill()


Fault = Callable[[Group], None]

STARTING: list[Fault] = [kill_rank_1, load_and_kill_rank_1, kill_rank_0]

IDLE: list[Fault] = [kill_rank_0, hang_rank_1]

RUNNING: list[tuple[Phase, Fault]] = [
    ("prefill", kill_rank_1_in_collective),
    ("prefill", kill_rank_0),
    ("prefill", disagree),
    ("decode", kill_rank_1),
    ("decode", kill_rank_0_in_collective),
    ("decode", hang_rank_1),
    ("decode", disagree),
]


def test_the_group_starts_anew_whatever_fails_when(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either rank: death, silence and other KV; open requests fail, later answers are equal."""
    monkeypatch.setattr(engine_client, "MAX_RESTART_DELAY", engine_client.MIN_RESTART_DELAY)
    monkeypatch.setattr(engine_client, "STALLED_AFTER", 0.5)
    monkeypatch.setattr(engine_client, "PING_INTERVAL", 0.1)
    config = {
        "ranks": 2,
        "rank_timeout": 5.0,
        "mtp": 1,
        "max_step_tokens": 32,
        "memory_budget": 1 << 28,
    }
    with ExitStack() as stack:
        live = stack.enter_context(
            live_server(
                folder=random_checkpoint, engine="disagreeing_engine", config=config, ready=False
            )
        )
        http = stack.enter_context(httpx.Client(base_url=live.url, timeout=TIMEOUT))
        group = Group(live, http)

        group.find()
        group.rank_1.kill()  # In its first start.
        group.wait_until_lost()
        before = group.answer()
        assert before
        group.rank_1.kill()
        for fail in STARTING:
            group.wait_until_lost()
            group.find()
            fail(group)
        group.wait_until_lost()
        assert group.answer() == before
        for fail in IDLE:
            fail(group)
            group.wait_until_lost()
            assert group.answer() == before, fail
        for number, (phase, fail) in enumerate(RUNNING):
            with group.request(phase, number):
                fail(group)
            group.wait_until_lost()
            assert group.answer() == before, (phase, fail)
