"""The service as a LaunchAgent on macOS; keys as in launchd.plist(5)."""

from __future__ import annotations

import os
import plistlib
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from glmd.cli.daemon.spec import (
    EXIT_MARGIN,
    OPEN_FILES,
    RESTART_AFTER,
    ServiceSpec,
    ServiceState,
    require_installed,
)
from glmd.errors import ServiceError
from glmd.utils.files import atomic_write

LABEL = "local.glmd"
"""Name of the service in launchd, below no domain that somebody owns."""

POLL = 0.2
"""Seconds between two looks at the progress of launchd."""

BUSY_TIMEOUT = 10.0
"""Seconds for which a bootstrap is repeated while launchd is busy with the last bootout."""

DEFAULT_EXIT_TIMEOUT = 20
"""Seconds: launchd's own, for a definition without `ExitTimeOut`."""

LOG_BYTES = 10_000_000
"""A log larger than this is renamed before the next start."""

NO_SUCH_PROCESS = 3
IN_PROGRESS = 36
ALREADY = 37
NO_DOMAIN = 112
NO_SERVICE = 113
UNSUPPORTED_DOMAIN = 125

_NO_SESSION = (
    "no graphical session to run it in. Log in at the Mac's screen (not only over ssh), or install"
    " the system-wide daemon from deploy/, which needs no login"
)
_BUSY = "launchd is still busy with the service. Try again in a few seconds"

ADVICE = {
    1: "not permitted. Run this as yourself, without sudo",
    5: (
        "the service is half loaded, or its file cannot be read. Run `glmd service uninstall`, then"
        " `glmd service install`; if that fails too, check the file with `plutil -lint`, and that"
        " glmd is switched on in System Settings > General > Login Items"
    ),
    17: "the service is already loaded. Reload it with `glmd service restart`",
    IN_PROGRESS: _BUSY,
    ALREADY: _BUSY,
    NO_DOMAIN: _NO_SESSION,
    119: "the service is switched off. Allow glmd in System Settings > General > Login Items",
    122: (
        "wrong owner or permissions of the file. You must own the file and its folder, and nobody"
        " else may write them (`chmod 600`)"
    ),
    UNSUPPORTED_DOMAIN: _NO_SESSION,
    150: "macOS protects this service from changes",
}
"""Cause and remedy by launchctl's exit status: errno values, and from 107 on launchd's own
(`launchctl error N` prints their names)."""


def agent_plist(spec: ServiceSpec, log: Path, *, label: str = LABEL) -> dict[str, Any]:
    """Return the property list of a LaunchAgent."""
    return {
        "Label": label,
        "ProgramArguments": list(spec.arguments),
        "RunAtLoad": True,
        # Restart after a crash or an error, but not after an orderly end.
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": RESTART_AFTER,
        "ExitTimeOut": spec.exit_timeout,
        # launchd throttles processor and disk of the default type.
        "ProcessType": "Interactive",
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
        "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
        "HardResourceLimits": {"NumberOfFiles": OPEN_FILES},
        "Umask": 0o077,
        # launchd opens the log once; the server reopens it after a rotation.
        "EnvironmentVariables": {**spec.environment, "GLMD_LOG_FILE": str(log)},
    }


class Launchd:
    """Service of the logged-in user, in launchd's domain `gui/UID`."""

    name = "launchd"

    def __init__(self) -> None:
        home = Path.home()
        self.domain = f"gui/{os.getuid()}"
        self.target = f"{self.domain}/{LABEL}"
        self.definition_file = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self.log = home / "Library" / "Logs" / "glmd" / "glmd.log"

    def install(self, spec: ServiceSpec) -> bool:
        content = plistlib.dumps(agent_plist(spec, self.log), sort_keys=False)
        unchanged = self.definition_file.exists() and self.definition_file.read_bytes() == content
        if unchanged and self.state().pid is not None:
            return False
        self.stop()
        atomic_write(self.definition_file, content)
        self.start()
        return True

    def uninstall(self) -> bool:
        installed = self.definition_file.exists() or self.state().loaded
        self.stop()
        self.definition_file.unlink(missing_ok=True)
        return installed

    def start(self) -> None:
        require_installed(self)
        state = self.state()
        if state.pid is not None:
            return
        if state.loaded:  # Ended, or waiting for its next attempt: reload, which resets counters.
            self.stop()
        # launchd creates the log, but not its folder.
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Rename a large log only while no server has it open and would go on writing into it.
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        launchctl("enable", self.target)  # undoes `launchctl disable`
        self._bootstrap()

    def _bootstrap(self) -> None:
        deadline = time.monotonic() + BUSY_TIMEOUT
        while True:
            status, text = launchctl("bootstrap", self.domain, str(self.definition_file))
            if not status:
                return
            if status not in (ALREADY, IN_PROGRESS) or time.monotonic() > deadline:
                raise refusal("bootstrap", status, text)
            time.sleep(POLL)

    def stop(self) -> None:
        # Unload instead of sending SIGTERM: launchd then enforces the exit timeout, and does not
        # restart the service because of its exit status.
        timeout = self._exit_timeout() + EXIT_MARGIN
        status, text = launchctl("bootout", self.target)
        if status in (NO_SUCH_PROCESS, NO_SERVICE):
            return
        if status not in (0, IN_PROGRESS):
            raise refusal("bootout", status, text)
        deadline = time.monotonic() + timeout
        while self.state().loaded:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"The service did not end within {timeout} s. See"
                    f" `launchctl print {self.target}`."
                )
            time.sleep(POLL)

    def _exit_timeout(self) -> int:
        try:
            plist = plistlib.loads(self.definition_file.read_bytes())
        except (OSError, plistlib.InvalidFileException):
            return DEFAULT_EXIT_TIMEOUT
        return int(plist.get("ExitTimeOut", DEFAULT_EXIT_TIMEOUT))

    def state(self) -> ServiceState:
        installed = self.definition_file.exists()
        failed, text = launchctl("print", self.target)
        if failed:
            return ServiceState(installed=installed, loaded=False)
        found = parse_fields(text)
        signal = re.search(r"\d+$", found.get("last terminating signal", ""))  # "Killed: 9"
        status = leading_number(found.get("last exit code", ""))  # "78: EX_CONFIG"
        return ServiceState(
            installed=installed,
            loaded=True,
            pid=leading_number(found.get("pid", "")),
            starts=leading_number(found.get("runs", "")),
            last_exit=-int(signal[0]) if signal else status,
        )

    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        # -F reopens the log when it is renamed.
        return ["tail", "-n", str(lines), *(["-F"] if follow else []), str(self.log)]


def launchctl(*arguments: str) -> tuple[int, str]:
    """Run launchctl and return its exit status and output.

    Raises:
        ServiceError: there is no launchctl on the PATH.
    """
    try:
        done = subprocess.run(  # noqa: S603
            ["launchctl", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise ServiceError("No launchctl on the PATH; on a Mac it is in /bin.") from None
    return done.returncode, (done.stdout + done.stderr).strip()


def refusal(verb: str, status: int, text: str) -> ServiceError:
    """Return the error for a failed launchctl: its first line, cause and remedy."""
    said = next((line for line in text.splitlines() if line.strip()), "nothing")
    advice = ADVICE.get(status, f"see `launchctl error {status}`")
    return ServiceError(f"launchctl {verb} failed with {said.strip()!r}: {advice}.")


def parse_fields(printed: str) -> dict[str, str]:
    """Parse the `key = value` lines of `launchctl print` outside nested blocks.

    The format is not documented; callers must not rely on any field.
    """
    found: dict[str, str] = {}
    depth = 0
    for line in printed.splitlines():
        text = line.strip()
        if text.endswith("{"):
            depth += 1
        elif text == "}":
            depth -= 1
        elif depth == 1 and " = " in text:
            key, value = text.split(" = ", 1)
            found[key] = value
    return found


def leading_number(value: str) -> int | None:
    """Parse the number at the start of a value; None without one."""
    match = re.match(r"\d+", value)
    return int(match[0]) if match else None
