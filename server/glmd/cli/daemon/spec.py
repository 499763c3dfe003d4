"""The command of the background service, and the interface to its manager."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from glmd.config import CONFIG_VARIABLE, PREFIX
from glmd.errors import ServiceError

EXIT_MARGIN = 30
"""Seconds added to the drain timeout: sending the last errors takes two, and the engine needs some
to free its arrays."""

OPEN_FILES = 65536
"""Limit of open files, one per connection. launchd's default is 256."""

RESTART_AFTER = 30
"""Minimum seconds between two starts: each start reads all weights."""

INHERITED = (PREFIX, "HF_")
"""Prefixes of the variables that the service inherits from the shell of `glmd service install`."""

NOT_INHERITED = ("HF_TOKEN",)
"""A secret that the service does not need: the model is downloaded before it starts."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """Command of a service.

    Attributes:
        arguments: the command line; its first word is an absolute path.
        environment: variables in addition to those of the service manager.
        exit_timeout: seconds between SIGTERM and SIGKILL.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    exit_timeout: int


@dataclass(frozen=True, slots=True)
class ServiceState:
    """State of the service as its manager reports it.

    Attributes:
        installed: the definition file exists, so the service starts at login.
        loaded: the manager has loaded the definition.
        pid: process id of the server; None: not running.
        starts: starts since the definition was loaded; None: not counted.
        last_exit: exit status of the last run, negative for a signal as in `subprocess`; None: no
            run has ended, or not reported.
    """

    installed: bool
    loaded: bool
    pid: int | None = None
    starts: int | None = None
    last_exit: int | None = None


class ServiceManager(Protocol):
    """launchd or systemd. All methods are idempotent.

    Methods raise `ServiceError`, with a remedy, when the manager refuses.
    """

    name: str

    @property
    def definition_file(self) -> Path: ...

    def install(self, spec: ServiceSpec) -> bool:
        """Install and start the service. Returns False if nothing had to be changed."""

    def uninstall(self) -> bool:
        """Stop and remove the service. Returns False if it was not installed."""

    def start(self) -> None:
        """Start the installed service."""

    def stop(self) -> None:
        """Stop the service and wait for its end. It starts again at the next login."""

    def state(self) -> ServiceState: ...

    def log_command(self, lines: int, *, follow: bool) -> list[str]:
        """Return the command that prints the service's log."""


def require_installed(manager: ServiceManager) -> None:
    """Raise a ServiceError unless the service is installed."""
    if not manager.definition_file.exists():
        raise ServiceError(
            f"The service is not installed: {manager.definition_file} does not exist. Run"
            " `glmd service install`."
        )


def build_spec(
    model: str | None,
    *,
    host: str | None = None,
    port: int | None = None,
    config: Path | None = None,
    drain_timeout: float,
) -> ServiceSpec:
    """Build the service of `glmd serve` with arguments, for any working directory.

    Args:
        model: folder or repo id; None, like `host` and `port`: from the service's other settings.
        config: the configuration file; None: the default file.
        drain_timeout: the setting, in seconds.

    Raises:
        ServiceError: this glmd is not installed permanently.
    """
    arguments = [*glmd_command(), "serve", "--service"]
    if model is not None:
        folder = Path(model).expanduser()
        arguments.append(str(folder.absolute()) if folder.is_dir() else model)
    for flag, value in (("--host", host), ("--port", port)):
        if value is not None:
            arguments += [flag, str(value)]
    if config is not None:
        arguments += ["--config", str(config.expanduser().absolute())]
    return ServiceSpec(
        arguments=tuple(arguments),
        environment=inherited(os.environ),
        exit_timeout=math.ceil(drain_timeout) + EXIT_MARGIN,
    )


def glmd_command() -> tuple[str, ...]:
    """Return the command that starts this glmd again, with an absolute path.

    The path by which the script was called is kept, not resolved: the links of `uv tool` and
    Homebrew survive upgrades of their targets. Without a script (`python -m glmd`): the
    interpreter.

    Raises:
        ServiceError: glmd runs from uv's cache.
    """
    if "archive-v0" in Path(sys.prefix).parts:
        raise ServiceError(
            "glmd runs from uv's cache (uvx), which can be emptied at any time. Run"
            " `uv tool install glmd`, then `glmd service install`."
        )
    script = shutil.which(sys.argv[0])
    if script is not None and Path(script).name == "glmd":
        return (os.path.abspath(script),)
    return (os.path.abspath(sys.executable), "-m", "glmd")


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that the service inherits, sorted by name."""
    found = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(INHERITED) and name not in NOT_INHERITED
    }
    if CONFIG_VARIABLE in found:
        found[CONFIG_VARIABLE] = str(Path(found[CONFIG_VARIABLE]).expanduser().absolute())
    return found
