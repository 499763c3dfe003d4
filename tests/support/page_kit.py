"""The web page in a browser, for its tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from browsers import chromium, find_chromium
from live import LiveServer
from paths import TESTS

CHECKS = TESTS / "support" / "page_checks.js"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip("there is no Chromium")
    from playwright.sync_api import expect  # noqa: PLC0415 - an optional package

    expect.set_options(timeout=20_000)  # For busy machines; what is expected comes at once.
    with chromium(path) as browser:
        yield browser


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page in a new browser; fails if the page violated its policy or logged errors."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
    context.set_default_timeout(20_000)
    context.add_init_script(path=CHECKS)
    tab = context.new_page()
    requested: list[str] = []
    failures: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))
    tab.on("pageerror", lambda error: failures.append(str(error)))
    tab.goto(url)
    try:
        yield tab
        assert tab.evaluate("checks.violations") == []
        assert failures == []
        assert {urlsplit(each).netloc for each in requested} == {urlsplit(url).netloc}
    finally:
        context.close()


@pytest.fixture
def tab(browser: Any, scripted: LiveServer) -> Iterator[Any]:
    """The page of a server with a scripted engine."""
    with opened(browser, scripted.url) as tab:
        yield tab


def send(tab: Any, text: str) -> None:
    tab.get_by_label("Message").fill(text)
    tab.keyboard.press("Enter")


def answers(tab: Any) -> Any:
    """Complete answers."""
    return tab.locator("article.answer[aria-busy=false]")
