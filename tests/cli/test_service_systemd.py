"""`glmd service` with systemd: the unit file, and the calls of systemctl."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from service_kit import path_with

from glmd.cli.daemon.spec import ServiceSpec
from glmd.cli.daemon.systemd import Systemd, unit_file
from glmd.errors import ServiceError

SPEC = ServiceSpec(
    ("/bin/echo", "serve", "my models/100% $HOME"), {"GLMD_API_KEY": 'a "b" \\ %h $c'}, 40
)

SYSTEMCTL = """#!/bin/sh
echo "$*" >> "$SYSTEMD_STATE/calls"
if [ -e "$SYSTEMD_STATE/refuse" ]; then cat "$SYSTEMD_STATE/refuse" >&2; exit 1; fi
case "$2" in show) cat "$SYSTEMD_STATE/show" ;; esac
"""

RUNNING = "LoadState=loaded\nActiveState=active\nMainPID=42\nExecMainStatus=0\nNRestarts=0\n"
KILLED = (
    "LoadState=loaded\nActiveState=activating\nMainPID=0\nExecMainCode=2\nExecMainStatus=9\n"
    "ExecMainExitTimestampMonotonic=5\nNRestarts=3\n"
)


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the state folder of a stand-in for systemctl."""
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(SYSTEMCTL)
    systemctl.chmod(0o755)
    state = tmp_path / "systemd"
    state.mkdir()
    (state / "show").write_text("LoadState=not-found\nMainPID=0\n")
    monkeypatch.setenv("PATH", path_with(systemctl.parent))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SYSTEMD_STATE", str(state))
    return state


def calls(state: Path) -> list[str]:
    lines = (state / "calls").read_text().splitlines()
    return [line.removeprefix("--user ") for line in lines if not line.startswith("--user show")]


def test_systemd_accepts_the_unit_file(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("only on Linux with systemd")
    file = tmp_path / "glmd.service"
    file.write_text(unit_file(SPEC))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    complaints = [line for line in done.stderr.splitlines() if str(file.name) in line]
    assert complaints == []


def test_characters_that_systemd_expands_are_escaped() -> None:
    text = unit_file(SPEC)
    assert 'ExecStart="/bin/echo" "serve" "my models/100%% $$HOME"' in text
    assert 'Environment="GLMD_API_KEY=a \\"b\\" \\\\ %%h $c"' in text


def test_install_enables_and_starts_the_unit_and_can_be_repeated(linux: Path) -> None:
    manager = Systemd()
    assert manager.install(SPEC)
    assert calls(linux) == [
        "daemon-reload",
        "enable glmd.service",
        "reset-failed glmd.service",
        "restart glmd.service",
    ]
    assert stat.S_IMODE(manager.definition_file.stat().st_mode) == 0o600
    (linux / "show").write_text(RUNNING)
    assert not manager.install(SPEC)
    assert len(calls(linux)) == 4


def test_uninstall_disables_and_removes_the_unit(linux: Path) -> None:
    manager = Systemd()
    manager.install(SPEC)
    assert manager.uninstall()
    assert calls(linux)[-2:] == ["disable --now glmd.service", "daemon-reload"]
    assert not manager.definition_file.exists()
    assert not manager.uninstall()


def test_state_comes_from_systemctl_show(linux: Path) -> None:
    manager = Systemd()
    assert manager.state().loaded is False
    (linux / "show").write_text(RUNNING)
    assert (manager.state().pid, manager.state().last_exit) == (42, None)
    (linux / "show").write_text(KILLED)
    state = manager.state()
    assert (state.pid, state.starts, state.last_exit) == (None, 4, -9)


def test_a_missing_user_manager_is_an_error_with_a_remedy(linux: Path) -> None:
    (linux / "refuse").write_text("Failed to connect to bus: No medium found\n")
    with pytest.raises(ServiceError, match=r"No medium found.*enable-linger"):
        Systemd().state()
