"""A pytest plugin for CI: a skipped test is a failed test.

`pytest -p no_skip`. A skip that says "only on ..." (another platform or device, which CI
runs elsewhere) stays a skip; one for want of a tool, a package or a file does not.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

ALLOWED = "only on "


def _forbid(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if reason.startswith(ALLOWED):
        return
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} was skipped, and here nothing may be: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid(report)
    return report
