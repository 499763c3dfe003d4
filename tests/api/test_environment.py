"""A server on a machine that is short of something starts, or says in one line what is missing."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sse

from glmd.api import sockets
from glmd.engine_client.process import socket_folder
from glmd.errors import SettingsError

pytestmark = pytest.mark.e2e

Served = subprocess.Popen[str]

SLEEP_SECONDS = 9.0

FULL = Path("/dev/full")


def serve(folder: Path, *options: str, files: int = 4096, **environment: str) -> Served:
    command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh"]
    return subprocess.Popen(
        [*command, sys.executable, "-m", "glmd", "serve", "demo", *options],
        env={**os.environ, "HOME": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_too_few_files_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 200))
    with pytest.raises(SettingsError, match=r"may open 200 files, and needs 256.*ulimit -Hn"):
        sockets.raise_file_limit()


def test_an_address_that_the_machine_lacks_is_a_sentence(tmp_path: Path) -> None:
    process = serve(tmp_path, "--host", "192.0.2.1", "--api-key", "secret", "--port", "0")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert "Cannot listen on 192.0.2.1" in line
    assert "--host" in line


def test_no_folder_for_temporary_files_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(OSError, match=r"/proc/none/glmd-.*Set TMPDIR"):
        socket_folder()


def test_localhost_is_served_without_ipv4_or_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (family, socket.SOCK_STREAM, 0, "", (address, 0, *rest))
        for family, address, *rest in (
            (socket.AF_INET, "127.0.0.1"),
            (socket.AF_INET6, "::1", 0, 0),
        )
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    bind = sockets._bind
    for missing in (socket.AF_INET, socket.AF_INET6):

        def refuse(family: int, address: tuple[Any, ...], missing: int = missing) -> socket.socket:
            if family == missing:
                raise OSError(97, "Address family not supported by protocol")
            return bind(family, address)

        monkeypatch.setattr(sockets, "_bind", refuse)
        (opened,) = sockets.listen("localhost", 0)
        assert opened.family != missing
        opened.close()
    monkeypatch.setattr(sockets, "_bind", lambda *_: refuse(missing, ()))
    with pytest.raises(SettingsError, match="Cannot listen on localhost"):
        sockets.listen("localhost", 0)


def test_a_server_that_is_short_of_nearly_all_serves(tmp_path: Path) -> None:
    """Its address is of IPv6, its log is on a full disk; it may open 300 files, and has no folder
    for its cache and none of its own for temporary files."""
    file = tmp_path / "file"
    file.touch()
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
    options: tuple[str, ...] = ("--host", "::1", "--port", str(port))
    if FULL.exists():  # Linux has it
        options += ("--log-file", str(FULL))
    places = {"TMPDIR": str(file), "GLMD_DISK_CACHE_FOLDER": str(file)}
    process = serve(tmp_path, *options, files=300, **places)
    try:
        with httpx.Client(base_url=f"http://[::1]:{port}", timeout=60) as http:
            wait_until_ready(http, process)
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            stored = http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 16})
            assert http.get(f"/v1/responses/{stored.json()['id']}").status_code == 200
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()


def wait_until_ready(http: httpx.Client, process: Served) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(process.communicate(timeout=1))


@pytest.mark.parametrize("offset", [-7200, 86_400])
def test_a_clock_that_jumps_changes_no_answer(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    now = time.time
    body = {"messages": [{"role": "user", "content": "⟦</think>one⟧"}], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        monkeypatch.setattr(time, "time", lambda: now() + offset)
        assert sse.read(response.read()).done
    stored = http.post("/v1/responses", json={"input": "⟦</think>two⟧"}).json()
    assert http.get(f"/v1/responses/{stored['id']}").json()["status"] == "completed"
    assert http.get("/glmd/status").status_code == 200


SLEEPER = """
import sys
from live import live_server
with live_server(config={"step_seconds": 0.1}, hang_timeout=LIMIT, request_timeout=LIMIT,
                 first_token_timeout=LIMIT, reader_timeout=LIMIT) as live:
    print(live.url, flush=True)
    sys.stdin.read()
"""


def test_streams_go_on_after_a_sleep_that_is_longer_than_all_deadlines() -> None:
    """All processes are stopped, and their clocks have jumped when they go on."""
    script = SLEEPER.replace("LIMIT", str(SLEEP_SECONDS - 1))
    words = "one two three four five six seven eight nine ten"
    body = {"messages": [{"role": "user", "content": f"⟦</think>{words}⟧"}], "stream": True}
    process = psutil.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        url = process.stdout.readline().strip()
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            pieces = response.iter_bytes()
            first = next(pieces)
            group = [process, *process.children(recursive=True)]
            assert len(group) > 1
            for each in group:
                each.send_signal(signal.SIGSTOP)
            time.sleep(SLEEP_SECONDS)
            for each in group:
                each.send_signal(signal.SIGCONT)
            found = sse.read(first + b"".join(pieces))
            text = "".join(c["choices"][0]["delta"].get("content") or "" for c in found.chunks)
            assert (text, found.done) == (words, True)
            assert http.get("/health").json()["restarts"] == 0
    finally:
        process.stdin.close()
        process.wait(60)
