"""The service as a systemd user unit on Linux."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from glmd.cli.daemon.spec import (
    OPEN_FILES,
    RESTART_AFTER,
    ServiceSpec,
    ServiceState,
    require_installed,
)
from glmd.errors import ServiceError
from glmd.utils.files import atomic_write

UNIT = "glmd.service"


def quote(word: str) -> str:
    """Quote a word for a unit file, in which `%` would be expanded (systemd.unit(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + escaped.replace("%", "%%") + '"'


def unit_file(spec: ServiceSpec) -> str:
    """Return the text of the unit file."""
    command = " ".join(quote(word).replace("$", "$$") for word in spec.arguments)
    environment = "\n".join(
        f"Environment={quote(f'{name}={value}')}" for name, value in spec.environment.items()
    )
    # KillMode: SIGTERM for the server only, which ends the engine after its last request.
    return f"""\
[Unit]
Description=glmd, a server for GLM-4.7-Flash

[Service]
Type=exec
ExecStart={command}
{environment}
Restart=on-failure
RestartSec={RESTART_AFTER}
TimeoutStopSec={spec.exit_timeout}
KillMode=mixed
LimitNOFILE={OPEN_FILES}
UMask=0077

[Install]
WantedBy=default.target
"""


class Systemd:
    """Service of one user, run by `systemd --user`."""

    name = "systemd"

    def __init__(self) -> None:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        self.definition_file = base / "systemd" / "user" / UNIT

    def install(self, spec: ServiceSpec) -> bool:
        content = unit_file(spec).encode()
        unchanged = self.definition_file.exists() and self.definition_file.read_bytes() == content
        if unchanged and self.state().pid is not None:
            return False
        atomic_write(self.definition_file, content)
        systemctl("daemon-reload")
        systemctl("enable", UNIT)
        # Failures so far must not count towards the limit of restarts.
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

    def state(self) -> ServiceState:
        shown = systemctl(
            "show", UNIT, "--property=LoadState,ActiveState,MainPID,ExecMainStatus,ExecMainCode,"
            "ExecMainExitTimestampMonotonic,NRestarts",
        )  # fmt: skip
        found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        pid = int(found.get("MainPID", 0)) or None
        ended = int(found.get("ExecMainExitTimestampMonotonic", 0)) > 0
        status = int(found.get("ExecMainStatus", 0))
        by_signal = found.get("ExecMainCode") in ("2", "3")  # CLD_KILLED, CLD_DUMPED: waitid(2)
        return ServiceState(
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


def systemctl(*arguments: str, may_fail: bool = False) -> str:
    """Run `systemctl --user` and return its output.

    Raises:
        ServiceError: systemctl failed, or does not exist.
    """
    try:
        done = subprocess.run(  # noqa: S603
            ["systemctl", "--user", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ServiceError("No systemctl on the PATH.") from None
    if done.returncode and not may_fail:
        said = done.stderr.strip().splitlines() or ["nothing"]
        hint = (
            " The user manager runs only while you are logged in. Keep it running with"
            " `loginctl enable-linger`, or install the system-wide unit from deploy/."
            if "bus" in done.stderr
            else f" See `systemctl --user status {UNIT}`."
        )
        raise ServiceError(f"systemctl {arguments[0]} failed with {said[-1]!r}.{hint}")
    return done.stdout
