"""The property list that tells launchd about glmd. Keys as in launchd.plist(5)."""

from __future__ import annotations

import plistlib
from pathlib import Path
from typing import Any

from glmd.cli.daemon.spec import OPEN_FILES, RESTART_AFTER, Definition

LABEL = "local.glmd"
"""The service's name in launchd: not below a domain that is someone's."""


def agent(definition: Definition, log: Path, *, label: str = LABEL) -> dict[str, Any]:
    """A LaunchAgent's property list."""
    plist: dict[str, Any] = {
        "Label": label,
        "ProgramArguments": list(definition.arguments),
        "RunAtLoad": True,
        # Again after a crash or an error, but not after an orderly end.
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": RESTART_AFTER,
        "ExitTimeOut": definition.exit_timeout,
        # Else launchd takes it for background work, and throttles its processor and disk.
        "ProcessType": "Interactive",
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
        "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
        "HardResourceLimits": {"NumberOfFiles": OPEN_FILES},
        "Umask": 0o077,
    }
    # launchd opens the log once; the server begins it anew after a rotation.
    plist["EnvironmentVariables"] = {**definition.environment, "GLMD_LOG_FILE": str(log)}
    return plist


def encode(plist: dict[str, Any]) -> bytes:
    """The file's bytes; the same for the same property list."""
    return plistlib.dumps(plist, sort_keys=False)
