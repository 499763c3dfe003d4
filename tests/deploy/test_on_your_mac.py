"""The README's first block, word by word: an empty home, a hub and a service manager.

The hub holds the demo under the name of the recommended model. The service manager is a stand-in
that runs the command of the unit file, so the walk works on Linux and in CI.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub import Hub
from paths import ROOT

from glmd.checkpoint.hub import DEMO, RECOMMENDED

PROGRAMS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

SYSTEMD = Path("/run/systemd/system")
"""A folder where systemd is the service manager, as in sd_booted(3)."""

SYSTEMCTL = """#!{python}
import os, pathlib, shlex, subprocess, sys
state = pathlib.Path(os.environ["SYSTEMD_STATE"])
unit = pathlib.Path(os.environ["HOME"], ".config/systemd/user/glmd.service")
if "restart" in sys.argv:
    lines = unit.read_text().splitlines()
    command = next(line for line in lines if line.startswith("ExecStart=")).partition("=")[2]
    log = open(state / "log", "w")
    server = subprocess.Popen(shlex.split(command), stdout=log, stderr=log, start_new_session=True)
    (state / "pid").write_text(str(server.pid))
if "show" in sys.argv:
    pid = state / "pid"
    print("LoadState=loaded")
    print("MainPID=" + (pid.read_text() if pid.exists() else "0"))
"""

CLIENT = """#!/bin/sh
exec curl -sS "$ANTHROPIC_BASE_URL/v1/messages" -H "content-type: application/json" \\
  -d '{"model":"default","max_tokens":8,"messages":[{"role":"user","content":"Hi"}]}'
"""


def block() -> list[str]:
    """Return the commands of the README's first block, without comments."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"## On your Mac\n.*?```sh\n(.*?)```", text, re.DOTALL)
    assert found
    return [line.partition("#")[0].strip() for line in found[1].splitlines()]


def status(port: str) -> Any:
    """Status in the server's /health."""
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).json()["status"]


def wait_for_port(log: Path) -> int:
    """Wait until a server whose log is in a file is ready; return its port."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = re.findall(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if found and status(found[0]) == "ready":
            return int(found[0])
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    done = subprocess.run(
        [*command, "--outdir", str(tmp_path / "dist"), str(ROOT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tmp_path / "dist").glob("*.whl")
    return built


@pytest.fixture
def environment(tmp_path: Path, hub: Hub) -> Iterator[dict[str, str]]:
    home, programs = tmp_path / "home", tmp_path / "programs"
    (home / ".config" / "glmd").mkdir(parents=True)
    (home / ".config" / "glmd" / "config.toml").write_text("port = 0\n")  # 8000 may be in use
    programs.mkdir()
    for name, text in (
        ("systemctl", SYSTEMCTL.format(python=sys.executable)),
        ("claude", CLIENT),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    state = tmp_path / "systemd"
    state.mkdir()
    kept = {k: v for k, v in os.environ.items() if k.startswith("UV_") or k == "LANG"}
    cache = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True)
    yield {
        "UV_SYSTEM_CERTS": "1",
        "UV_CACHE_DIR": cache.stdout.strip(),  # Packages that are there are not downloaded again.
        **kept,
        "HOME": str(home),
        "PATH": f"{programs}:{home}/.local/bin:{PROGRAMS}",
        "SYSTEMD_STATE": str(state),
        "HF_ENDPOINT": hub.url,
        "NO_PROXY": "127.0.0.1",
    }
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((state / "pid").read_text()), signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux: the stand-in is for systemd")
@pytest.mark.skipif(shutil.which("uv", path=PROGRAMS) is None, reason="uv is not installed")
def test_the_first_block_leads_from_an_empty_home_to_an_answered_request(
    environment: dict[str, str], hub: Hub, wheel: Path, tmp_path: Path
) -> None:
    hub.files = {file.name: file.read_bytes() for file in DEMO.iterdir() if file.is_file()}
    hub.repo = RECOMMENDED
    commands = block()
    assert [command.split()[:2] for command in commands] == [
        ["uv", "tool"], ["glmd", "doctor"], ["glmd", "pull"], ["glmd", "service"],
        ["glmd", "connect"],
    ]  # fmt: skip
    output = ""
    for command in commands:
        words = [str(wheel) if word == "glmd" and "uv" in command else word
                 for word in shlex.split(command)]  # fmt: skip
        if words[:2] == ["glmd", "connect"]:
            port = wait_for_port(tmp_path / "systemd" / "log")
            words += ["--url", f"http://127.0.0.1:{port}"]
        if words[:2] == ["glmd", "service"] and not SYSTEMD.is_dir():
            # In a container. glmd then says to run `glmd serve`, which is what a service does.
            words = ["systemctl", "restart"]
            unit = tmp_path / "home" / ".config" / "systemd" / "user" / "glmd.service"
            unit.parent.mkdir(parents=True)
            unit.write_text(f"ExecStart={tmp_path}/home/.local/bin/glmd serve --service\n")
        done = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        output = done.stdout
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    answer = json.loads(output)
    assert answer["type"] == "message"
    served = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).json()["data"][0]["id"]
    assert served == RECOMMENDED
