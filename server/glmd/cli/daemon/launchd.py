"""glmd as a LaunchAgent: launchd's side of `glmd service`."""

from __future__ import annotations

import os
import plistlib
import time
from pathlib import Path

from glmd.cli.daemon.files import holds, put_aside, tail
from glmd.cli.daemon.launchctl import (
    ALREADY,
    IN_PROGRESS,
    NOT_LOADED,
    fields,
    launchctl,
    leading_number,
    refusal,
    signal_number,
)
from glmd.cli.daemon.manager import State, require_installed
from glmd.cli.daemon.plist import LABEL, agent, encode
from glmd.cli.daemon.spec import EXIT_MARGIN, Definition
from glmd.errors import ServiceError
from glmd.utils.files import atomic_write

POLL = 0.2
"""Seconds between two looks at what launchd does in its own time."""

BUSY_PATIENCE = 10.0
"""Seconds that a bootstrap is tried again while launchd is still busy with the last bootout."""


class Launchd:
    """The service of the user who is logged in, in launchd's domain `gui/UID`."""

    name = "launchd"

    def __init__(self) -> None:
        home = Path.home()
        self.domain = f"gui/{os.getuid()}"
        self.target = f"{self.domain}/{LABEL}"
        self.definition_file = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self.log = home / "Library" / "Logs" / "glmd" / "glmd.log"

    def install(self, definition: Definition) -> bool:
        content = encode(agent(definition, self.log))
        state = self.state()
        if state.pid is not None and holds(self.definition_file, content):
            return False
        self.stop()
        atomic_write(self.definition_file, content)
        self.start()
        return True

    def uninstall(self) -> bool:
        there = self.definition_file.exists() or self.state().loaded
        self.stop()
        self.definition_file.unlink(missing_ok=True)
        return there

    def start(self) -> None:
        require_installed(self)
        state = self.state()
        if state.pid is not None:
            return
        if state.loaded:  # It ended, or waits for its next attempt: anew, with counters at zero.
            self.stop()
        # launchd creates the log, but not its folder.
        self.log.parent.mkdir(parents=True, exist_ok=True)
        put_aside(self.log)
        # Whoever switched it off by `launchctl disable` wants it on by now.
        launchctl("enable", self.target)
        self._bootstrap()

    def _bootstrap(self) -> None:
        deadline = time.monotonic() + BUSY_PATIENCE
        while True:
            answer = launchctl("bootstrap", self.domain, str(self.definition_file))
            if not answer.status:
                return
            if answer.status not in (ALREADY, IN_PROGRESS) or time.monotonic() > deadline:
                raise refusal("bootstrap", answer)
            time.sleep(POLL)

    def stop(self) -> None:
        # Unloaded rather than signalled: launchd then sees to it that it ends, and does not take
        # an end by SIGTERM for a failure after which to start it again.
        patience = self._exit_timeout() + EXIT_MARGIN
        answer = launchctl("bootout", self.target)
        if answer.status in NOT_LOADED:
            return
        if answer.status not in (0, IN_PROGRESS):
            raise refusal("bootout", answer)
        deadline = time.monotonic() + patience
        while self.state().loaded:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"The service has not left {patience} s after launchd was told to end it;"
                    f" `launchctl print {self.target}` says what it is doing."
                )
            time.sleep(POLL)

    def _exit_timeout(self) -> int:
        """launchd's own patience with the service, 20 s where its file says nothing."""
        try:
            return int(plistlib.loads(self.definition_file.read_bytes()).get("ExitTimeOut", 20))
        except (OSError, plistlib.InvalidFileException):
            return 20

    def state(self) -> State:
        installed = self.definition_file.exists()
        answer = launchctl("print", self.target)
        if answer.status:  # Whatever the reason, launchd does not run it.
            return State(installed=installed, loaded=False)
        found = fields(answer.text)
        killed = signal_number(found.get("last terminating signal"))
        exited = leading_number(found.get("last exit code"))
        return State(
            installed=installed,
            loaded=True,
            pid=leading_number(found.get("pid")),
            starts=leading_number(found.get("runs")),
            last_exit=-killed if killed is not None else exited,
        )

    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        # -F goes on with the new file when the log is put aside.
        return ["tail", "-n", str(lines), *(["-F"] if follow else []), str(self.log)]

    def log_tail(self, lines: int) -> str:
        return tail(self.log, lines)
