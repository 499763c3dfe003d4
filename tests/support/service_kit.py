"""Home folder with a stand-in for launchctl, for the tests of `glmd service`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


@dataclass(frozen=True)
class Mac:
    """State of the stand-in for launchctl."""

    home: Path
    state: Path

    @property
    def calls(self) -> list[str]:
        """Calls of launchctl except `print`, in order."""
        path = self.state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("print ")]

    def refuse(self, command: str, *answers: tuple[int, str]) -> None:
        (self.state / "refuse.json").write_text(json.dumps({command: answers}))

    @property
    def agent(self) -> Path:
        return self.home / "Library" / "LaunchAgents" / "local.glmd.plist"

    @property
    def log(self) -> Path:
        return self.home / "Library" / "Logs" / "glmd" / "glmd.log"


def executable(path: Path, script: Path) -> Path:
    """Write a program to `path` that runs a stand-in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{script}" "$@"\n')
    path.chmod(0o755)
    return path


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ["PATH"]])
