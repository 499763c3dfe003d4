"""A server on a machine that is short of something starts, or says in one line what is missing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def fail_to_serve(folder: Path, *options: str, files: int | None = None) -> str:
    """Start `glmd serve`, which must fail; return its only line on stderr."""

    def limit_files() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    done = subprocess.run(
        [sys.executable, "-m", "glmd", "serve", "demo", "--port", "0", *options],
        env={**os.environ, "HOME": str(folder)},
        check=False,
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_too_few_files_are_a_sentence(tmp_path: Path) -> None:
    assert "may open 200 files, and needs 256" in fail_to_serve(tmp_path, files=200)


def test_an_address_that_the_machine_lacks_is_a_sentence(tmp_path: Path) -> None:
    line = fail_to_serve(tmp_path, "--host", "192.0.2.1", "--api-key", "secret")
    assert "Cannot listen on 192.0.2.1" in line
