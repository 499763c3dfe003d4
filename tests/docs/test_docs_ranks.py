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

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def answer(self) -> str:
        body = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        response = self.http.post("/v1/completions", json=body)
        text: str = response.json()["choices"][0]["text"]
        return text


def test_commands_serve_with_two_ranks(random_checkpoint: Path, tmp_path: Path) -> None:
    """On one machine, and with one rank on another host."""
    simulate, local, rank, hosts = (block.strip() for block in COMMANDS)
    assert simulate.startswith("glmd bench simulate --ranks")
    with ExitStack() as stack:
        shell = Shell(tmp_path, random_checkpoint, stack)
        shell.start(local)
        shell.wait_until_ready()
        answer = shell.answer()
        assert answer
        assert "glmd_rank_sums_total" in shell.http.get("/metrics").text
    for host in HOSTS:
        host["ips"] = ["127.0.0.1"]
    (tmp_path / "hosts.json").write_text(json.dumps(HOSTS))
    with ExitStack() as stack:
        shell = Shell(tmp_path, random_checkpoint, stack)
        shell.start(rank)
        shell.start(hosts)
        shell.wait_until_ready()
        assert shell.answer() == answer
