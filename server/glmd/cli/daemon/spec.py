"""What the service runs: the command, its environment, its limits and its log."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmd.config import CONFIG_VARIABLE, PREFIX
from glmd.errors import ServiceError

DEFAULT_DRAIN = 30.0
"""Seconds: `Settings.drain_timeout`'s default."""

EXIT_MARGIN = 10
"""Seconds beyond the drain timeout in which the server must have left: it takes two for the last
errors to be sent, and the engine some for its arrays."""

OPEN_FILES = 65536
"""A connection is an open file, and launchd's own limit is 256 of them."""

RESTART_AFTER = 30
"""Seconds from one start to the next at the earliest: each reads all the weights."""

CARRIED = (PREFIX, "HF_")
"""Environment variables that the service inherits from the shell of `glmd service install`."""

NOT_CARRIED = ("HF_TOKEN",)
"""A secret that the service does not need: the model is downloaded before it starts."""


@dataclass(frozen=True, slots=True)
class Definition:
    """One service.

    Attributes:
        arguments: the command; an absolute path first.
        environment: variables beyond those that the service manager sets.
        exit_timeout: seconds that the server gets to leave after SIGTERM.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    exit_timeout: int


def define(
    *,
    model: str | None,
    host: str | None,
    port: int | None,
    config: Path | None,
    drain_timeout: float = DEFAULT_DRAIN,
) -> Definition:
    """The service that runs `glmd serve` as this process would, from any working directory.

    Args:
        model: a folder or a hub id; None: what the other settings say.
        host: likewise.
        port: likewise.
        config: the configuration file; None: the one that `glmd serve` finds.
        drain_timeout: the setting, from which follows how long the server may take to leave.

    Raises:
        ServiceError: this glmd lies where it will not stay.
    """
    arguments = [*program(), "serve"]
    if model is not None:
        folder = Path(model).expanduser()
        arguments.append(str(folder.absolute()) if folder.is_dir() else model)
    for flag, value in (("--host", host), ("--port", port)):
        if value is not None:
            arguments += [flag, str(value)]
    if config is not None:
        arguments += ["--config", str(config.expanduser().absolute())]
    return Definition(
        arguments=tuple(arguments),
        environment=carried(os.environ),
        exit_timeout=math.ceil(drain_timeout) + EXIT_MARGIN,
    )


def program() -> tuple[str, ...]:
    """The absolute command that starts this glmd again.

    The script that was called, by the name it was called: the links of `uv tool` and Homebrew stay
    where they are when what they point to is upgraded. Without one (`python -m glmd`), the
    interpreter.

    Raises:
        ServiceError: it runs from a cache that uv empties at will.
    """
    if "archive-v0" in Path(sys.prefix).parts:
        raise ServiceError(
            "This glmd runs from uv's cache (uvx), which may be emptied at any time; run"
            " `uv tool install glmd`, then `glmd service install`."
        )
    script = shutil.which(sys.argv[0])
    if script is not None and Path(script).name == "glmd":
        return (os.path.abspath(script),)
    return (os.path.abspath(sys.executable), "-m", "glmd")


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` the service gets, sorted by name."""
    found = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(CARRIED) and name not in NOT_CARRIED
    }
    if CONFIG_VARIABLE in found:
        found[CONFIG_VARIABLE] = str(Path(found[CONFIG_VARIABLE]).expanduser().absolute())
    return found
