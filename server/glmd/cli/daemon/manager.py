"""What a service manager does for glmd, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from glmd.cli.daemon.spec import Definition
from glmd.errors import ServiceError


@dataclass(frozen=True, slots=True)
class State:
    """What the service manager knows of the service.

    Attributes:
        installed: its definition is there, so that it starts with the user's session.
        loaded: the manager knows it now.
        pid: of the running server; None: it is not running.
        starts: how often it was started since it was loaded, if the manager counts them.
        last_exit: status of its last run, as in `subprocess`: negative is a signal's number;
            None: no run has ended, or the manager does not say.
    """

    installed: bool
    loaded: bool
    pid: int | None = None
    starts: int | None = None
    last_exit: int | None = None


class Manager(Protocol):
    """launchd or systemd. Every method may be called at any time, and repeated.

    They raise `ServiceError` when the manager refuses, with what to do about it.
    """

    name: str

    @property
    def definition_file(self) -> Path: ...

    def install(self, definition: Definition) -> bool:
        """Define the service, and have it run as defined. Whether anything had to be done."""

    def uninstall(self) -> bool:
        """Stop the service and forget it. Whether there was one."""

    def start(self) -> None:
        """Have the installed service running."""

    def stop(self) -> None:
        """End it in order, and wait until it has left. It comes back with the next login."""

    def state(self) -> State: ...

    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        """The command that prints the service's log."""

    def log_tail(self, lines: int) -> str:
        """The end of the service's log, as far as there is one."""


def require_installed(manager: Manager) -> None:
    if not manager.definition_file.exists():
        raise ServiceError(
            f"The service is not installed (there is no {manager.definition_file}); run"
            " `glmd service install`."
        )
