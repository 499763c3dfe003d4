"""SIGHUP: reload of settings and of the log file while requests run."""

from __future__ import annotations

import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import sse
from live import live_server

from glmd.api.server import RELOADABLE, reload_settings
from glmd.config import Settings
from glmd.config_sources import load
from glmd.engine.main import serve
from glmd.ipc import SetLogLevel, Shutdown, ToEngine


def wait(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_reload_applies_reloadable_settings_names_others_and_keeps_streams(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "glmd.toml"
    body = {"messages": [{"role": "user", "content": "⟦</think>one two three⟧"}], "stream": True}
    caplog.set_level(logging.INFO, "glmd")
    with (
        live_server(config={"step_seconds": 0.05}) as live,
        live.client() as http,
        http.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        pieces = response.iter_bytes()
        first = next(pieces)
        file.write_text(
            "port = 0\nmax_body = '2MiB'\ntemperature = 0.125\naliases = ['new']\n"
            "[profiles.mine]\ntop_k = 5\n"
        )
        monkeypatch.delenv("GLMD_DISK_CACHE_FOLDER")
        reload_settings(live.service, lambda: load({}, file))
        chunks = sse.read(first + b"".join(pieces)).chunks
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert text == "one two three"
        with live.client() as other:
            listed = other.get("/v1/models").json()["data"]
            assert "new" in listed[0]["aliases"]
            assert listed[1]["id"] == "test/tiny:mine"
        assert live.service.defaults("new").sampling.temperature == 0.125
        assert live.service.settings.max_body == 32 * 2**20
    assert "Settings reloaded: changed=aliases,profiles,temperature" in caplog.text
    assert "Settings that need a restart: changed=max_body" in caplog.text


def test_an_invalid_file_keeps_the_settings_and_logs_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "glmd.toml"
    file.write_text("temprature = 0.1\n")
    with live_server(temperature=0.5) as live:
        reload_settings(live.service, lambda: load({}, file))
        assert live.service.settings.temperature == 0.5
    assert "did you mean temperature?" in caplog.text


class Told:
    """The engine's end of the socket, with the messages to deliver."""

    def __init__(self, *messages: ToEngine) -> None:
        self._messages = list(messages)

    def receive(self, timeout: float | None) -> ToEngine:
        return self._messages.pop(0)

    def send(self, message: object) -> None:
        pass


def test_the_engine_process_applies_a_new_log_level() -> None:
    ours = logging.getLogger("glmd")
    before = ours.level
    try:
        serve(SimpleNamespace(has_work=False, info=None), Told(SetLogLevel("ERROR"), Shutdown()))  # type: ignore[arg-type]
        assert ours.level == logging.ERROR
    finally:
        ours.setLevel(before)


def test_every_reloadable_name_is_a_setting() -> None:
    assert Settings.model_fields.keys() >= RELOADABLE


# -- the command, whose engine does not matter here ------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "glmd.toml"
    file.write_text("")
    return file


@pytest.fixture(autouse=True)
def hear_sighup() -> Iterator[None]:
    """The test runner may ignore SIGHUP, which child processes inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_sighup_reloads_settings_and_reopens_a_renamed_log(file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["serve", "--port", "0", "--config", str(file), "--log-file", str(log)]
    process = subprocess.Popen([sys.executable, "-m", "glmd", *command], start_new_session=True)
    try:
        wait(lambda: log.exists() and answers(log.read_text()))
        log.rename(tmp_path / "log.0")
        file.write_text("aliases = ['later']")
        process.send_signal(signal.SIGHUP)
        wait(lambda: log.exists() and "changed=aliases" in log.read_text())
        url = url_in(log.with_name("log.0").read_text())
        assert httpx.get(f"{url}/v1/models/later", timeout=60).status_code == 200
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def url_in(output: str) -> str | None:
    """The server's URL in its output, which may end within the URL."""
    found = re.search(r"http://127\.0\.0\.1:\d+(?=\W)", output)
    return found and found[0]


def answers(output: str) -> bool:
    try:
        url = url_in(output)
        return url is not None and httpx.get(f"{url}/livez", timeout=60).is_success
    except httpx.TransportError:  # not yet, or on a busy machine not in time
        return False


def test_closing_the_terminal_stops_the_server(file: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        arguments = ["-m", "glmd", "serve", "--port", "0", "--config", str(file)]
        os.execv(sys.executable, [sys.executable, *arguments])
    seen = b""
    while not answers(seen.decode(errors="replace")):
        # A terminal that nobody reads blocks a process that writes to it.
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
