"""A worker answers whatever happens to its process; a message is refused for what it does only."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import worker_answers

import glmd
from glmd.utils import worker as module
from glmd.utils.worker import Worker, WorkerError

pytestmark = pytest.mark.e2e

QUIET_POLLS = 40
"""Checks without CPU time, 2 s, that replace a process: more than a busy machine makes one wait."""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    folders = (Path(worker_answers.__file__).parent, Path(glmd.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    found = Worker("worker_answers:make_answer", seconds=1.0, setup=b"setup")
    yield found
    found.close()


def test_a_message_over_a_limit_is_refused_and_the_next_one_answered(worker: Worker) -> None:
    for data, reason in ((b"loop", "time"), (b"allocate", "memory"), (b"overflow", "crash")):
        with pytest.raises(WorkerError) as caught:
            worker.ask(data, max_bytes=200 << 20)
        assert caught.value.reason == reason
        assert worker.ask(b"hello") == b"setup|hello"


def test_a_message_whose_process_was_killed_is_given_to_another(worker: Worker) -> None:
    for _ in range(2):
        worker.ask(b"hello")
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    assert worker.ask(b"hello") == b"setup|hello"


@pytest.mark.parametrize("size", [5, 5_000_000], ids=["waiting", "sending"])
def test_a_stopped_process_is_replaced(
    worker: Worker, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_POLLS", QUIET_POLLS)
    worker.ask(b"hello")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    assert worker.ask(b"x" * size) == b"setup|" + b"x" * size


def test_a_process_that_is_stopped_at_its_start_is_replaced(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_POLLS", QUIET_POLLS)
    start = subprocess.Popen
    stopped: list[int] = []

    def stop_first(*args: Any, **options: Any) -> Any:
        process = start(*args, **options)
        if not stopped:
            stopped.append(process.pid)
            os.kill(process.pid, signal.SIGSTOP)
        return process

    monkeypatch.setattr(subprocess, "Popen", stop_first)
    assert worker.ask(b"hello") == b"setup|hello"


def test_a_message_is_not_to_blame_for_signals_from_outside(worker: Worker) -> None:
    with pytest.raises(WorkerError) as caught:
        worker.ask(b"killed")
    assert caught.value.reason == "gone"


def test_closing_ends_a_wait(worker: Worker) -> None:
    worker.start()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker.ask, b"wait")
        threading.Event().wait(0.1)
        worker.close()
        with pytest.raises(WorkerError):
            waiting.result()
    assert worker.pid is None
