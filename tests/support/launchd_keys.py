"""Types of the launchd.plist(5) keys that glmd uses."""

from __future__ import annotations

from typing import Any

DOCUMENTED: dict[str, Any] = {
    "Label": str,
    "ProgramArguments": [str],
    "EnvironmentVariables": {str: str},
    "RunAtLoad": bool,
    "KeepAlive": {"SuccessfulExit": bool},
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": {"Background", "Standard", "Adaptive", "Interactive"},
    "StandardOutPath": str,
    "StandardErrorPath": str,
    "WorkingDirectory": str,
    "SoftResourceLimits": {"NumberOfFiles": int},
    "HardResourceLimits": {"NumberOfFiles": int},
    "Umask": int,
    "UserName": str,
    "GroupName": str,
    "InitGroups": bool,
}
"""Keys and their types."""


def check_documented(plist: dict[str, Any]) -> None:
    """Check that all keys are documented, and their values have the documented types."""
    check(plist, DOCUMENTED)


def check(value: Any, documented: Any) -> None:
    if isinstance(documented, type):
        assert type(value) is documented, (value, documented)
    elif isinstance(documented, set):
        assert value in documented
    elif isinstance(documented, list):
        for item in value:
            check(item, documented[0])
    elif str in documented:
        for key, item in value.items():
            check(key, str)
            check(item, documented[str])
    else:
        for key, item in value.items():
            assert key in documented, key
            check(item, documented[key])
