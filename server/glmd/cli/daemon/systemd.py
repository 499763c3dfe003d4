"""glmd as a systemd user unit: systemd's side of `glmd service`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from glmd.cli.daemon.files import holds
from glmd.cli.daemon.manager import State, require_installed
from glmd.cli.daemon.spec import OPEN_FILES, RESTART_AFTER, Definition
from glmd.errors import ServiceError
from glmd.utils.files import atomic_write

UNIT = "glmd.service"


def quote(word: str) -> str:
    """A word as unit files want it: `%` and `$` would be expanded (systemd.service(5))."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + plain.replace("%", "%%") + '"'


def unit(definition: Definition) -> str:
    """The unit file."""
    command = " ".join(quote(word).replace("$", "$$") for word in definition.arguments)
    environment = [
        f"Environment={quote(f'{name}={value}')}" for name, value in definition.environment.items()
    ]
    return "\n".join(
        [
            "[Unit]",
            "Description=glmd, a server for GLM-4.7-Flash",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={command}",
            *environment,
            "Restart=on-failure",
            f"RestartSec={RESTART_AFTER}",
            f"TimeoutStopSec={definition.exit_timeout}",
            # The engine leaves with the server; killing it alongside would lose its answers.
            "KillMode=mixed",
            f"LimitNOFILE={OPEN_FILES}",
            "UMask=0077",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


class Systemd:
    """The service of one user, run by `systemd --user`."""

    name = "systemd"

    def __init__(self) -> None:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        self.definition_file = base / "systemd" / "user" / UNIT

    def install(self, definition: Definition) -> bool:
        content = unit(definition).encode()
        if self.state().pid is not None and holds(self.definition_file, content):
            return False
        atomic_write(self.definition_file, content)
        systemctl("daemon-reload")
        systemctl("enable", UNIT)
        # An earlier failure must not count towards this start.
        systemctl("reset-failed", UNIT, may_fail=True)
        systemctl("restart", UNIT)
        return True

    def uninstall(self) -> bool:
        if not self.definition_file.exists():
            return False
        systemctl("disable", "--now", UNIT)
        self.definition_file.unlink()
        systemctl("daemon-reload")
        return True

    def start(self) -> None:
        require_installed(self)
        systemctl("start", UNIT)

    def stop(self) -> None:
        if self.definition_file.exists():
            systemctl("stop", UNIT)

    def state(self) -> State:
        shown = systemctl(
            "show", UNIT, "--property=LoadState,ActiveState,MainPID,ExecMainStatus,ExecMainCode,"
            "ExecMainExitTimestampMonotonic,NRestarts",
        )  # fmt: skip
        found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        pid = int(found.get("MainPID", 0)) or None
        ended = int(found.get("ExecMainExitTimestampMonotonic", 0)) > 0
        status = int(found.get("ExecMainStatus", 0))
        # waitid(2)'s si_code: 1 is an exit, 2 and 3 are ends by a signal.
        by_signal = found.get("ExecMainCode") in ("2", "3")
        return State(
            installed=self.definition_file.exists(),
            loaded=found.get("LoadState") == "loaded",
            pid=pid,
            starts=int(found.get("NRestarts", 0)) + 1,
            last_exit=(-status if by_signal else status) if ended else None,
        )

    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        return [
            "journalctl", "--user", f"--unit={UNIT}", f"--lines={lines}", "--no-pager",
            *(["--follow"] if follow else []),
        ]  # fmt: skip

    def log_tail(self, lines: int) -> str:
        command = self.log_command(lines, follow=False)
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout.strip()


def systemctl(*arguments: str, may_fail: bool = False) -> str:
    """What `systemctl --user` prints.

    Raises:
        ServiceError: it refuses, with its own words.
    """
    try:
        done = subprocess.run(  # noqa: S603
            ["systemctl", "--user", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ServiceError("There is no systemctl on the PATH.") from None
    if done.returncode and not may_fail:
        said = done.stderr.strip().splitlines() or ["nothing"]
        hint = (
            " Without a session of yours there is no user manager: `loginctl enable-linger` keeps"
            " one, or install the system-wide unit from deploy/."
            if "bus" in done.stderr
            else f" `systemctl --user status {UNIT}` may say more."
        )
        raise ServiceError(f"systemctl {arguments[0]} said {said[-1]!r}.{hint}")
    return done.stdout
