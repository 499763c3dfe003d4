"""Every shell block of the README and of "get started" is run, against the real thing.

A block is run by `sh -e`, in the repository, with a home of its own and another port. Lines that
begin with `make serve` or `glmd serve` start a server, which the following lines and blocks talk
to. What cannot be run here is marked in front of its block, where readers do not see it:

    <!-- not run: why -->                 the block
    <!-- not run (make test): why -->     its lines that begin so

`pytest -s -k listed tests/docs/test_docs_shell.py` lists them.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from paths import ROOT

PAGES = ("README.md", "docs/index.md")
BLOCK = re.compile(
    r"(?:^<!-- not run(?: \((?P<lines>[^)]+)\))?: (?P<why>.+?) -->\n+)?"
    r"^```(?P<language>sh|python)\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
SERVES = ("make serve", "glmd serve")
PATIENCE = 120


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    run: str
    """What of it is run."""
    left_out: str
    why: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        lines = found["text"].splitlines(keepends=True)
        left_out = []
        if found["why"]:
            left_out = [
                each for each in lines if not found["lines"] or each.startswith(found["lines"])
            ]
            assert left_out, f"{page}: no line begins with {found['lines']!r}"
        run = "".join(each for each in lines if each not in left_out)
        line = text.count("\n", 0, found.start("text"))
        yield Block(
            page, line, found["language"], run, "".join(left_out), found["why"] or ""
        )  # fmt: skip


class Reader:
    """Somebody who does what a page says, one block after the other."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        tools = folder / "bin"
        tools.mkdir()
        # The environment that this suite runs in is set up already, and is not to be changed.
        make = tools / "make"
        installed = Path(sys.executable).parent
        make.write_text(
            f"#!/bin/sh\nexec {shutil.which('make')} -o setup BIN={installed} PORT={self.port}"
            ' "$@"\n'
        )
        make.chmod(0o755)
        # Nor is the make under which the suite may run to hand its arguments on.
        ours = ("GLMD_", "MAKE", "MFLAGS", "ARGS")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self._environment = kept | {
            "PATH": f"{tools}:{installed}:{os.environ['PATH']}",
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
            "GLMD_PORT": str(self.port),
            "NO_COLOR": "1",
        }

    def do(self, block: Block) -> str:
        """Run a block; what it printed."""
        text = block.run.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        text = text.replace("/tmp/", f"{self._folder}/")
        if block.language == "python":
            return self._run([sys.executable, "-c", text], block)
        printed = ""
        for part in parts(text):
            if part.startswith(SERVES):
                self._serve(part)
            elif part.strip():
                printed += self._run(["sh", "-e", "-c", part], block)
        return printed

    def _run(self, command: list[str], block: Block) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.page}, line {block.line}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def _serve(self, line: str) -> None:
        self.stop()
        with (self._folder / "log").open("wb") as log:
            self._server = subprocess.Popen(
                ["sh", "-c", line], cwd=ROOT, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not self._is_ready():
            said = (self._folder / "log").read_text()
            assert self._server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGTERM)
            self._server.wait(60)
            self._server = None


def parts(text: str) -> Iterator[str]:
    """Pieces of a block in order: each line that serves alone, what is between in one piece."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if line.startswith(SERVES):
            yield piece
            yield line
            piece = ""
        else:
            piece += line
    yield piece


@contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    reader = Reader(folder)
    try:
        yield reader
    finally:
        reader.stop()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_does_what_the_page_says(page: str, tmp_path: Path) -> None:
    with reading(tmp_path) as reader:
        for block in blocks(page):
            printed = reader.do(block) if block.run.strip() else ""
            if "curl" in block.run:
                assert '"reasoning_content":' in printed, printed
                assert '"content":' in printed
                assert printed.rstrip().endswith("data: [DONE]")
            if "glmd chat" in block.run or block.language == "python":
                assert not block.run.strip() or printed.strip(), block


def test_what_is_not_run_says_why_and_is_listed() -> None:
    for page in PAGES:
        found = list(blocks(page))
        assert any(block.run for block in found)
        for block in found:
            if block.left_out:
                print(f"{page}, line {block.line}, not run, {block.why}:")
                print(textwrap.indent(block.left_out, "    "))
                assert re.match(r"it (needs|takes|is) ", block.why), block
