"""`glmd service` with the real launchd, in CI: installs a service for this user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from glmd.cli.daemon.launchd import Launchd

pytestmark = pytest.mark.skipif(
    sys.platform != "darwin" or "LAUNCHD_TESTS" not in os.environ,
    reason="only on macOS with LAUNCHD_TESTS set: installs a service for this user",
)

GLMD = Path(sys.executable).with_name("glmd")


def glmd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(GLMD), "service", *arguments], capture_output=True, text=True, check=False
    )


def report() -> dict[str, object]:
    done: dict[str, object] = json.loads(glmd("status", "--json").stdout)
    return done


def test_launchd_runs_stops_and_removes_the_service() -> None:
    manager = Launchd()
    assert not manager.definition_file.exists(), "this would replace a service that is in use"
    try:
        done = glmd("install", "--port", "0")
        assert done.returncode == 0, done.stderr
        subprocess.run(["plutil", "-lint", manager.definition_file], check=True)
        first = report()
        assert first["status"] == "ready"
        assert httpx.get(f"{first['url']}/health", timeout=60).json()["model"] == first["model"]

        done = glmd("install", "--port", "0")
        assert done.returncode == 0, done.stderr
        assert report()["pid"] == first["pid"]

        done = glmd("restart")
        assert done.returncode == 0, done.stderr
        second = report()
        assert second["status"] == "ready"
        assert second["pid"] != first["pid"]
        assert "glmd" in glmd("logs", "-n", "20").stdout

        assert glmd("stop").returncode == 0
        assert report()["status"] == "stopped"
        done = glmd("start")
        assert done.returncode == 0, done.stderr
    finally:
        done = glmd("uninstall")
    assert done.returncode == 0, done.stderr
    assert report()["status"] == "not installed"
    assert not manager.definition_file.exists()
