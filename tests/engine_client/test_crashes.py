"""Crashes of engine and server, and failed starts: responses to clients, and cleanup."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sse
from live import LiveServer, live_server, serving

from glmd.checkpoint.hub import DEMO
from glmd.engine_client import client as engine_client

CRASHES = 10

TIMEOUT = 300.0
"""Seconds for anything on a machine under heavy load; no test waits that long by itself."""


def chat_body(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 100, **fields}


def is_openai_error(error: dict[str, Any]) -> bool:
    return (error["type"], error["code"]) == ("server_error", "engine_unavailable")


def chat_stream_failed(body: bytes) -> bool:
    events = sse.read(body)
    return not events.done and is_openai_error(events.chunks[-1]["error"])


def responses_stream_failed(body: bytes) -> bool:
    last = sse.read_named(body)[-1]
    return bool(last["type"] == "response.failed" and last["response"]["status"] == "failed")


def messages_stream_failed(body: bytes) -> bool:
    last = sse.read_named(body)[-1]
    return bool(last["type"] == "error" and last["error"]["type"] == "api_error")


def openai_failed(body: bytes) -> bool:
    return is_openai_error(json.loads(body)["error"])


def anthropic_failed(body: bytes) -> bool:
    answer = json.loads(body)
    return bool(answer["type"] == "error" and answer["error"]["type"] == "api_error")


STREAMED: list[tuple[str, Callable[[str], dict[str, Any]], Callable[[bytes], bool]]] = [
    ("/v1/chat/completions", chat_body, chat_stream_failed),
    ("/v1/completions", lambda text: {"prompt": text, "max_tokens": 100}, chat_stream_failed),
    ("/v1/responses", lambda text: {"input": text}, responses_stream_failed),
    ("/v1/messages", chat_body, messages_stream_failed),
]
WHOLE: list[tuple[str, Callable[[str], dict[str, Any]], Callable[[bytes], bool]]] = [
    ("/v1/chat/completions", chat_body, openai_failed),
    ("/v1/responses", lambda text: {"input": text}, openai_failed),
    ("/v1/messages", chat_body, anthropic_failed),
]


def send_open_ended(
    live: LiveServer, pool: ThreadPoolExecutor, text: str
) -> list[Future[tuple[str, int, bytes]]]:
    """Send one endless request of every kind; return when all of them run in the engine."""

    def stream(path: str, body: dict[str, Any]) -> tuple[str, int, bytes]:
        with (
            live.client() as http,
            http.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            return path, response.status_code, response.read()

    def whole(path: str, body: dict[str, Any]) -> tuple[str, int, bytes]:
        with live.client() as http:
            response = http.post(path, json=body)
            return path, response.status_code, response.content

    sent = [pool.submit(stream, path, body(f"{text} s{path}")) for path, body, _ in STREAMED]
    sent += [pool.submit(whole, path, body(f"{text} w{path}")) for path, body, _ in WHOLE]
    deadline = time.monotonic() + TIMEOUT
    while live.service.engine.stats.running < len(sent):
        assert time.monotonic() < deadline
        assert not any(future.done() for future in sent)
        time.sleep(0.02)
    return sent


def assert_failed(sent: list[Future[tuple[str, int, bytes]]]) -> None:
    """Check that each request failed in its API's shape; started streams fail by an event."""
    for (_, _, failed), future in zip([*STREAMED, *WHOLE], sent, strict=True):
        path, status, body = future.result(TIMEOUT)
        if status == 200:
            assert failed(body), (path, body)
        else:  # not streamed, or the engine died before the first token
            assert status == 503
            assert (anthropic_failed if path == "/v1/messages" else openai_failed)(body)


def kill(live: LiveServer, number: int) -> None:
    """Crash the engine by a signal, or by an exception in a step."""
    pid = live.service.engine.pid
    assert pid is not None
    match number % 3:
        case 0:
            os.kill(pid, signal.SIGKILL)
        case 1:
            os.kill(pid, signal.SIGABRT)  # as Metal does when out of memory
        case 2:
            with live.client() as http:
                body = chat_body(f"{number} ⟦{{raise}}⟧")
                assert http.post("/v1/chat/completions", json=body).status_code == 503


def test_ten_crashes_in_a_row_fail_open_requests_and_leak_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(engine_client, "MIN_RESTART_DELAY", 0.01)
    monkeypatch.setattr(engine_client, "MAX_RESTART_DELAY", 0.1)
    this = psutil.Process()
    others = set(this.children())  # of servers that other tests share
    files: list[int] = []
    with live_server() as live, ThreadPoolExecutor(16) as pool:
        for number in range(CRASHES):
            sent = send_open_ended(live, pool, f"{number} ⟦Once upon{{wait}}⟧")
            engine = psutil.Process(live.service.engine.pid)
            kill(live, number)
            assert_failed(sent)
            engine.wait(TIMEOUT)
            with live.client() as http:
                health = http.get("/health")
                if health.json()["status"] != "ready":
                    assert health.status_code == 503
                    assert health.json()["status"] == "restarting"
                assert live.wait_for("ready")["restarts"] == number + 1
                answer = http.post("/v1/chat/completions", json=chat_body("⟦</think>Here.⟧"))
                assert answer.json()["choices"][0]["message"]["content"] == "Here."
            live.wait_until_idle()
            assert len(set(this.children()) - others) == 2  # the engine, and the template's
            assert len(list(tmp_path.glob("glmd-*"))) == 1
            gc.collect()
            files.append(this.num_fds())
    # Connections that clients have just closed may still be on their way out.
    assert min(files[-3:]) <= max(files[:2])
    assert not set(this.children()) - others
    assert not list(tmp_path.glob("glmd-*"))


def test_a_quarantined_request_is_rejected_in_every_apis_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "MIN_RESTART_DELAY", 0.01)
    with live_server() as live, live.client() as http:
        for path in ("/v1/chat/completions", "/v1/messages"):
            fatal = chat_body("⟦{die}⟧")
            for _ in range(2):
                live.wait_for("ready")
                assert http.post(path, json=fatal).status_code == 503
            live.wait_for("ready")
            for stream in (True, False):
                refused = http.post(path, json={**fatal, "stream": stream})
                assert refused.status_code == 422
                error = refused.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert "crashed 2 times" in error["message"]
        assert http.get("/health").json()["restarts"] == 4
        fine = http.post("/v1/chat/completions", json=chat_body("⟦</think>Here.⟧"))
        assert fine.json()["choices"][0]["message"]["content"] == "Here."


# -- the command ----------------------------------------------------------------------------


def wait_until_ready(http: httpx.Client) -> None:
    deadline = time.monotonic() + TIMEOUT
    while http.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_killed_during_a_stream_leaves_no_processes_and_folders(
    tmp_path: Path,
) -> None:
    with (
        serving(str(DEMO), folder=tmp_path, GLMD_DRAIN_TIMEOUT=str(TIMEOUT)) as (process, url),
        httpx.Client(base_url=url, timeout=TIMEOUT) as http,
    ):
        wait_until_ready(http)
        json_body = chat_body("Hello", response_format={"type": "json_object"}, max_tokens=4)
        assert http.post("/v1/chat/completions", json=json_body).status_code == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 3  # the engine, the template worker and the grammar worker
        assert list(tmp_path.glob("glmd-*"))
        # Long enough to last until the kill, whatever the load: about 10 s on an idle machine.
        body = chat_body("Tell me a story.", ignore_eos=True, stream=True, max_tokens=4000)
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces = response.iter_raw()
            next(pieces)
            process.kill()
            process.wait()
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)
        _, alive = psutil.wait_procs(children, timeout=TIMEOUT)
        assert not alive
        assert not list(tmp_path.glob("glmd-*"))


def test_sigterm_lets_a_stream_complete_and_exits_with_0(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with (
        serving(str(random_checkpoint), folder=tmp_path, GLMD_DRAIN_TIMEOUT=str(TIMEOUT)) as (
            process,
            url,
        ),
        httpx.Client(base_url=url, timeout=TIMEOUT) as http,
    ):
        wait_until_ready(http)
        body = chat_body("Go on.", ignore_eos=True, stream=True)
        body["max_tokens"] = 500
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces = response.iter_raw()
            received = next(pieces)
            process.send_signal(signal.SIGTERM)
            assert b"[DONE]" not in received
            events = sse.read(received + b"".join(pieces))
        assert events.done
        assert events.chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(TIMEOUT) == 0
        assert not list(tmp_path.glob("glmd-*"))


def cut_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def nothing(folder: Path) -> None:
    pass


def test_a_damaged_or_too_large_checkpoint_ends_the_start_with_one_line(
    tmp_path: Path,
) -> None:
    expected = [
        (cut_off, "model.safetensors: model.embed_tokens.weight is cut off"),
        (no_tokenizer, "tokenizer.json"),
        (nothing, "does not fit in memory. Weights "),
    ]
    starts = []
    for number, (damage, _) in enumerate(expected):
        folder = tmp_path / str(number)
        shutil.copytree(DEMO, folder)
        damage(folder)
        command = [sys.executable, "-m", "glmd", "serve", str(folder), "--port", "0"]
        if damage is nothing:
            command.append("--memory-budget=20MiB")
        starts.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for start, (_, words) in zip(starts, expected, strict=True):
        _, errors = start.communicate(timeout=TIMEOUT)
        assert start.returncode == 1
        (line,) = (line for line in errors.splitlines() if not line.startswith("{"))
        assert line.startswith("glmd: ")
        assert words in line
