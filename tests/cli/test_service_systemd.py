"""systemd's side of `glmd service`: the unit, and the conversation with systemctl."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from service_kit import path_with

from glmd.cli.daemon.spec import Definition
from glmd.cli.daemon.systemd import Systemd, unit
from glmd.errors import ServiceError

DEFINITION = Definition(
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
    """Where a stand-in for systemctl keeps its state."""
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


def test_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("only on Linux with systemd")
    file = tmp_path / "glmd.service"
    file.write_text(unit(DEFINITION))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    complaints = [line for line in done.stderr.splitlines() if str(file.name) in line]
    assert complaints == []


def test_what_systemd_would_expand_is_escaped() -> None:
    text = unit(DEFINITION)
    assert 'ExecStart="/bin/echo" "serve" "my models/100%% $$HOME"' in text
    assert 'Environment="GLMD_API_KEY=a \\"b\\" \\\\ %%h $c"' in text


def test_installing_enables_and_starts_it_and_may_be_repeated(linux: Path) -> None:
    manager = Systemd()
    assert manager.install(DEFINITION)
    assert calls(linux) == [
        "daemon-reload",
        "enable glmd.service",
        "reset-failed glmd.service",
        "restart glmd.service",
    ]
    assert stat.S_IMODE(manager.definition_file.stat().st_mode) == 0o600
    (linux / "show").write_text(RUNNING)
    assert not manager.install(DEFINITION)
    assert len(calls(linux)) == 4


def test_uninstalling_disables_and_removes_it(linux: Path) -> None:
    manager = Systemd()
    manager.install(DEFINITION)
    assert manager.uninstall()
    assert calls(linux)[-2:] == ["disable --now glmd.service", "daemon-reload"]
    assert not manager.definition_file.exists()
    assert not manager.uninstall()


def test_the_state_is_read_from_properties(linux: Path) -> None:
    manager = Systemd()
    assert manager.state().loaded is False
    (linux / "show").write_text(RUNNING)
    assert (manager.state().pid, manager.state().last_exit) == (42, None)
    (linux / "show").write_text(KILLED)
    state = manager.state()
    assert (state.pid, state.starts, state.last_exit) == (None, 4, -9)


def test_without_a_user_manager_it_says_what_to_do(linux: Path) -> None:
    (linux / "refuse").write_text("Failed to connect to bus: No medium found\n")
    with pytest.raises(ServiceError, match=r"No medium found.*enable-linger"):
        Systemd().state()
