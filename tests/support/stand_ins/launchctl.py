"""Stand-in for launchctl and launchd: starts and ends real processes.

State in the folder `LAUNCHD_STATE`: `calls` (one line per call), `refuse.json` (by command, a list
of `[status, text]` for the next calls), `loaded.json` (the loaded property list).
"""

from __future__ import annotations

import json
import os
import plistlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

STATE = Path(os.environ["LAUNCHD_STATE"])


def answer(status: int, text: str = "") -> NoReturn:
    print(text, file=sys.stderr if status else sys.stdout)
    sys.exit(status)


def read(name: str) -> Any:
    path = STATE / name
    return json.loads(path.read_text()) if path.exists() else None


def supervise() -> NoReturn:
    """Act as launchd: run the program once, and record its exit status."""
    plist = read("loaded.json")["plist"]
    with open(plist["StandardErrorPath"], "ab") as log:
        child = subprocess.Popen(
            plist["ProgramArguments"],
            env={"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"],
                 **plist.get("EnvironmentVariables", {})},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
        )  # fmt: skip
    (STATE / "pid").write_text(str(child.pid))
    (STATE / "ended").write_text(str(child.wait()))
    sys.exit()


def bootstrap(domain: str, file: str) -> NoReturn:
    if read("loaded.json"):
        answer(5, "Bootstrap failed: 5: Input/output error")
    with open(file, "rb") as stream:
        plist = plistlib.load(stream)
    (STATE / "loaded.json").write_text(json.dumps({"target": f"{domain}/{plist['Label']}",
                                                   "plist": plist, "path": file}))  # fmt: skip
    for name in ("pid", "ended"):
        (STATE / name).unlink(missing_ok=True)
    subprocess.Popen(
        [sys.executable, __file__, "supervise"], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    answer(0)


def bootout(target: str) -> NoReturn:
    loaded = read("loaded.json")
    if not loaded or loaded["target"] != target:
        answer(3, "Boot-out failed: 3: No such process")
    while not (STATE / "pid").exists():
        time.sleep(0.01)
    if not (STATE / "ended").exists():
        os.kill(int((STATE / "pid").read_text()), signal.SIGTERM)
    (STATE / "leaving").touch()
    answer(36, "Boot-out failed: 36: Operation now in progress")


def show(target: str) -> NoReturn:
    loaded = read("loaded.json")
    if loaded and (STATE / "leaving").exists() and (STATE / "ended").exists():
        (STATE / "loaded.json").unlink()
        (STATE / "leaving").unlink()
        loaded = None
    if not loaded or loaded["target"] != target:
        answer(113, f'Could not find service "{target}" in domain for user gui: {os.getuid()}')
    ended = (STATE / "ended").read_text() if (STATE / "ended").exists() else None
    running = ended is None and (STATE / "pid").exists()
    lines = [f"{target} = {{", "\tactive count = 1", f"\tpath = {loaded['path']}",
             f"\tstate = {'running' if running else 'spawn scheduled'}", "",
             "\targuments = {", "\t\tpid = 1", "\t}", "\truns = 1"]  # fmt: skip
    if running:
        lines.append(f"\tpid = {(STATE / 'pid').read_text()}")
    if ended is None:
        lines.append("\tlast exit code = (never exited)")
    elif int(ended) < 0:
        lines.append(f"\tlast terminating signal = Killed: {-int(ended)}")
    else:
        lines.append(f"\tlast exit code = {ended}: EX_SOMETHING")
    answer(0, "\n".join([*lines, "}"]))


def main() -> NoReturn:
    command, *arguments = sys.argv[1:]
    if command == "supervise":
        supervise()
    with (STATE / "calls").open("a") as calls:
        print(command, *arguments, file=calls)
    refusals = read("refuse.json") or {}
    if refusals.get(command):
        status, text = refusals[command].pop(0)
        (STATE / "refuse.json").write_text(json.dumps(refusals))
        answer(status, text)
    if command == "enable":
        answer(0)
    commands: dict[str, Callable[..., NoReturn]] = {
        "bootstrap": bootstrap, "bootout": bootout, "print": show
    }  # fmt: skip
    commands[command](*arguments)


if __name__ == "__main__":
    main()
