"""The browser, for tests of the web page."""

from page_kit import browser, tab

__all__ = ["browser", "tab"]
