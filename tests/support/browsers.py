"""The browser of this machine, for tests of the page and for its picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAC_CHROME = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_chromium() -> str | None:
    """Chromium or Chrome, if there is one."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found or (str(MAC_CHROME) if MAC_CHROME.exists() else None)


@contextmanager
def chromium(path: str) -> Iterator[Any]:
    """A headless browser, spoken to through Playwright."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - not everyone has it

    with sync_playwright() as playwright:
        # Without its sandbox, because root, which CI may be, is not given one.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
