"""Shell and Python blocks of the README and the start page, run as printed.

Shell blocks run with `sh -e` in the repository, with an own home folder and another port. A line
that begins with `make serve` or `glmd serve` starts a server for the following lines and blocks. A
comment before a block excludes it, or its lines with a prefix:

    <!-- not run: reason -->
    <!-- not run (make test): reason -->

`pytest -s -k listed tests/docs/test_docs_shell.py` lists the excluded lines.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
from paths import ROOT

PAGES = ("README.md", "docs/index.md")
BLOCK = re.compile(
    r"(?:^<!-- not run(?: \((?P<prefix>[^)]+)\))?: (?P<reason>.+?) -->\n+)?"
    r"^```(?P<language>sh|python)\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
SERVE = re.compile(r"^((?:make|glmd) serve.*\n?)", re.MULTILINE)
TIMEOUT = 120
"""Seconds for a block, and for a server to become ready."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    run: str
    excluded: str
    reason: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        lines = found["text"].splitlines(keepends=True)
        excluded = []
        if found["reason"]:
            excluded = [each for each in lines if each.startswith(found["prefix"] or "")]
            assert excluded, f"{page}: no line begins with {found['prefix']!r}"
        run = "".join(each for each in lines if each not in excluded)
        line = text.count("\n", 0, found.start("text"))
        yield Block(
            page, line, found["language"], run, "".join(excluded), found["reason"] or ""
        )  # fmt: skip


class PageRunner:
    """Run the blocks of a page in order, with a server in the background."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        tools = folder / "bin"
        tools.mkdir()
        # Use the environment of this test run instead of setting up another.
        make = tools / "make"
        installed = Path(sys.executable).parent
        make.write_text(
            f"#!/bin/sh\nexec {shutil.which('make')} -o setup BIN={installed} PORT={self.port}"
            ' "$@"\n'
        )
        make.chmod(0o755)
        # `make test` passes its arguments on by the environment.
        dropped = ("GLMD_", "MAKE", "MFLAGS", "ARGS")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self._environment = kept | {
            "PATH": f"{tools}:{installed}:{os.environ['PATH']}",
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
            "GLMD_PORT": str(self.port),
            "NO_COLOR": "1",
        }

    def run(self, block: Block) -> str:
        """Run a block and return its output."""
        text = block.run.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        text = text.replace("/tmp/", f"{self._folder}/")
        if block.language == "python":
            return self._run([sys.executable, "-c", text], block)
        printed = ""
        for part in SERVE.split(text):
            if SERVE.match(part):
                self._serve(part)
            elif part.strip():
                printed += self._run(["sh", "-e", "-c", part], block)
        return printed

    def _run(self, command: list[str], block: Block) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=TIMEOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.page}, line {block.line}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def _serve(self, line: str) -> None:
        self.close()
        with (self._folder / "log").open("wb") as log:
            self._server = subprocess.Popen(
                ["sh", "-c", line], cwd=ROOT, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + TIMEOUT
        while not self._is_ready():
            output = (self._folder / "log").read_text()
            assert self._server.poll() is None, output
            assert time.monotonic() < deadline, output
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGTERM)
            self._server.wait(60)
            self._server = None


def test_blocks_run_and_print_what_the_pages_say(tmp_path: Path) -> None:
    """What a later page has in the same words is not run again."""
    done: set[str] = set()
    with closing(PageRunner(tmp_path)) as runner:
        for block in (block for page in PAGES for block in blocks(page)):
            commands = re.sub(r"\s+# .*", "", block.run).strip()
            if commands in done:
                continue
            done.add(commands)
            printed = runner.run(block) if commands else ""
            if "curl" in block.run:
                assert '"reasoning_content":' in printed, printed
                assert '"content":' in printed
                assert printed.rstrip().endswith("data: [DONE]")
            if "glmd chat" in block.run or block.language == "python":
                assert not block.run.strip() or printed.strip(), block


def test_excluded_lines_have_a_reason_and_are_listed() -> None:
    for page in PAGES:
        found = list(blocks(page))
        assert any(block.run for block in found)
        for block in found:
            if block.excluded:
                print(f"{page}, line {block.line}, not run, {block.reason}:")
                print(textwrap.indent(block.excluded, "    "))
                assert re.match(r"it (needs|takes|is) ", block.reason), block
