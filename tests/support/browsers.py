"""Chromium through Playwright, for tests and the screenshot of the web UI."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAC_CHROME = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_chromium() -> str | None:
    """Return the path of Chromium or Chrome. None: not installed."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found or (str(MAC_CHROME) if MAC_CHROME.exists() else None)


@contextmanager
def chromium(path: str) -> Iterator[Any]:
    """Start a headless browser."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - an optional package

    with sync_playwright() as playwright:
        # Chromium refuses to run sandboxed as root, which CI may be.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
