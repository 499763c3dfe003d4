"""Which service manager this system has."""

from __future__ import annotations

import sys
from pathlib import Path

from glmd.cli.daemon.launchd import Launchd
from glmd.cli.daemon.manager import Manager
from glmd.cli.daemon.systemd import Systemd
from glmd.errors import ServiceError

BOOTED = Path("/run/systemd/system")
"""There where systemd is what the machine was booted with (sd_booted(3))."""


def find_manager() -> Manager:
    """This system's.

    Raises:
        ServiceError: it has none that glmd speaks to.
    """
    if sys.platform == "darwin":
        return Launchd()
    if BOOTED.is_dir():
        return Systemd()
    raise ServiceError(
        "`glmd service` speaks to launchd (macOS) and systemd (Linux), and neither runs here; have"
        " your own supervisor run `glmd serve` and restart it when it fails."
    )
