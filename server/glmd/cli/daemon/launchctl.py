"""One call of launchctl, and what its answers mean."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from glmd.errors import ServiceError

NO_SUCH_PROCESS = 3
IN_PROGRESS = 36
ALREADY = 37
NO_DOMAIN = 112
NO_SERVICE = 113
UNSUPPORTED_DOMAIN = 125

NOT_LOADED = (NO_SUCH_PROCESS, NO_SERVICE)
"""What launchctl exits with for a service that launchd does not know."""

_NO_SESSION = (
    "there is no graphical session of yours to run it in: log in at the Mac's screen (not only over"
    " ssh), or install the system-wide daemon from deploy/, which needs nobody logged in"
)

ADVICE = {
    1: "it is not permitted: run this as yourself, without sudo",
    5: (
        "it found the service half loaded, or its file unreadable: run"
        " `glmd service uninstall`, then `glmd service install`; if that fails too,"
        " `plutil -lint` on the file says whether it is sound, and System Settings > General >"
        " Login Items must not have glmd switched off"
    ),
    17: "the service is loaded already: `glmd service restart` loads it anew",
    IN_PROGRESS: "it is still busy with the service: try again in a few seconds",
    ALREADY: "it is still busy with the service: try again in a few seconds",
    NO_DOMAIN: _NO_SESSION,
    119: "the service is switched off: allow glmd in System Settings > General > Login Items",
    122: (
        "the file's owner or permissions are wrong: it must be yours and nobody else may write it"
        " (`chmod 600`), and so must be its folder"
    ),
    UNSUPPORTED_DOMAIN: _NO_SESSION,
    150: "macOS protects this service from changes",
}
"""What to do, by launchctl's exit status: errno values, and from 107 on launchd's own
(`launchctl error N` names them)."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    text: str


def launchctl(*arguments: str) -> Answer:
    """Run launchctl.

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
        raise ServiceError("There is no launchctl on the PATH; on a Mac it is in /bin.") from None
    return Answer(done.returncode, (done.stdout + done.stderr).strip())


def refusal(verb: str, answer: Answer) -> ServiceError:
    """The error that says what launchctl said, and what to do."""
    said = next((line for line in answer.text.splitlines() if line.strip()), "nothing")
    advice = ADVICE.get(answer.status, f"`launchctl error {answer.status}` may say more")
    return ServiceError(f"launchctl {verb} said {said.strip()!r}: {advice}.")


def fields(printed: str) -> dict[str, str]:
    """The service's own `key = value` lines of `launchctl print`, without those of nested blocks.

    Apple promises nothing about that text, so nothing here relies on a field being there.
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


def leading_number(value: str | None) -> int | None:
    """`78` of "78: EX_CONFIG"; None of "(never exited)"."""
    match = re.match(r"\d+", value or "")
    return int(match.group()) if match else None


def signal_number(value: str | None) -> int | None:
    """`9` of "Killed: 9"."""
    match = re.search(r"(\d+)$", value or "")
    return int(match.group()) if match else None
