"""The commands of docs/ranks.md, with a small model and hosts that are this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import sse
from paths import ROOT

TIMEOUT = 300.0
"""Seconds for anything on a machine under heavy load."""

PAGE = (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
HOSTS: list[dict[str, Any]] = json.loads(
    re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.M)[0]
)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Shell:
    """Runs commands of the page in a folder, each in the background until the end."""

    def __init__(self, folder: Path, model: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._folder = folder
        port = free_port()
        self.http = stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT)
        )
        self._environment = os.environ | {
            "HOME": str(folder),
            "GLMD_MODEL": str(model),
            "GLMD_PORT": port,
            "GLMD_MTP": "off",
            "GLMD_RANK_PORT": free_port(),
            "GLMD_RANK_TIMEOUT": "5",
        }

    def start(self, command: str) -> None:
        program, *arguments = shlex.split(command)
        assert program == "glmd"
        process = subprocess.Popen(
            [sys.executable, "-m", "glmd", *arguments], cwd=self._folder, env=self._environment
        )

        def end() -> None:
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT)

        self._stack.callback(end)

    def wait_for(self, restarts: int) -> dict[str, Any]:
        """Wait until the engine is ready for the time after `restarts`; returns its status."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                engine: dict[str, Any] = self.http.get("/glmd/status").json()["engine"]
                if (engine["state"], engine["restarts"]) == ("ready", restarts):
                    return engine
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def rank_1(self, restarts: int) -> psutil.Process:
        """The process of the only local rank besides the engine."""
        (found,) = psutil.Process(self.wait_for(restarts)["pid"]).children()
        return found

    def answer(self) -> str:
        response = self.http.post("/v1/completions", json=completion(3))
        text: str = response.json()["choices"][0]["text"]
        return text


def completion(max_tokens: int, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "abc", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return body | fields


def test_commands_serve_with_two_ranks_and_replace_lost_ones(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    """A rank that is killed while it answers, one that is stopped, and one on another host."""
    simulate, local, rank, hosts = (block.strip() for block in COMMANDS)
    assert simulate.startswith("glmd bench simulate --ranks")
    with ExitStack() as stack:
        shell = Shell(tmp_path, random_checkpoint, stack)
        shell.start(local)
        lost = shell.rank_1(0)
        before = shell.answer()
        assert before
        body = completion(3000, stream=True)
        with shell.http.stream("POST", "/v1/completions", json=body) as response:
            chunks = response.iter_raw()
            received = next(chunks)
            lost.kill()
            received += b"".join(chunks)
        events = sse.read(received)
        assert not events.done
        assert events.chunks[-1]["error"]["code"] == "engine_unavailable"
        stopped = shell.rank_1(1)
        assert shell.answer() == before
        metrics = shell.http.get("/metrics").text
        assert "glmd_rank_sums_total" in metrics
        stopped.suspend()
        shell.wait_for(2)
        assert not stopped.is_running()
        assert shell.answer() == before
    for host in HOSTS:
        host["ips"] = ["127.0.0.1"]
    (tmp_path / "hosts.json").write_text(json.dumps(HOSTS))
    with ExitStack() as stack:
        shell = Shell(tmp_path, random_checkpoint, stack)
        shell.start(rank)
        shell.start(hosts)
        shell.wait_for(0)
        assert shell.answer() == before
