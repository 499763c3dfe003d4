"""Keep a Mac from idle sleep while requests run.

Without keyboard or mouse input, a Mac goes to sleep even while its GPU computes. `caffeinate` holds
a power assertion against idle sleep, which `pmset -g assertions` lists.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextvars import Context

from glmd.api.observability.request_stats import RequestRegistry, RequestStats

log = logging.getLogger("glmd.api")

PROGRAM: str | None = "/usr/bin/caffeinate" if sys.platform == "darwin" else None
"""None: the platform has no such program."""

GRACE_SECONDS = 10.0
"""Longer than the pauses between an agent's turns, so that they share one process."""


class IdleSleepBlocker:
    """Holds a power assertion while requests run, and for a grace period afterwards.

    One process of `program` holds the assertion for all requests. It exits with the API process
    (`-w`), even after a crash. If the program fails, requests run without the assertion; only the
    first failure is logged.

    Args:
        registry: the running requests.
        is_enabled: returns the setting `prevent_sleep`, which may change while running.
        program: path of `caffeinate`; None: never block sleep.
        grace: seconds without requests before the assertion ends.
    """

    def __init__(
        self,
        registry: RequestRegistry,
        is_enabled: Callable[[], bool],
        program: str | None,
        grace: float,
    ) -> None:
        self._registry = registry
        self._is_enabled = is_enabled
        self._program = program
        self._grace = grace
        self._changed = asyncio.Event()
        """A request has started or ended."""
        self._holding: asyncio.Task[None] | None = None
        self._has_warned = False
        if program is not None:
            registry.on_start.append(self._request_started)
            registry.on_end.append(self._request_ended)

    async def close(self) -> None:
        """End the assertion, at shutdown."""
        if self._holding is not None:
            self._holding.cancel()
            await asyncio.wait((self._holding,))

    def _request_started(self, _: RequestStats) -> None:
        self._changed.set()
        is_holding = self._holding is not None and not self._holding.done()
        if not is_holding and self._is_enabled():
            # An empty context: in the request's context, log lines have the request's id.
            self._holding = asyncio.create_task(self._hold(), name="power", context=Context())

    def _request_ended(self, _: RequestStats) -> None:
        self._changed.set()

    async def _hold(self) -> None:
        """Hold the assertion until the requests and the grace period are over."""
        assert self._program is not None
        # A loop, since a request may start while the process is being killed.
        while self._registry.running and self._is_enabled():
            try:
                process = await asyncio.create_subprocess_exec(
                    self._program,
                    *("-i", "-w", str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C must not end it before requests are drained.
                )
            except OSError as error:
                self._warn(error.strerror)
                return
            try:
                await self._wait_until_idle()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                else:
                    self._warn(f"exit status {process.returncode}")

    async def _wait_until_idle(self) -> None:
        """Wait until no request has run for the grace period."""
        while True:
            self._changed.clear()
            try:
                async with asyncio.timeout(None if self._registry.running else self._grace):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _warn(self, problem: object) -> None:
        if not self._has_warned:
            self._has_warned = True
            message = "Idle sleep is not prevented while requests run: program=%s problem=%s"
            log.warning(message, self._program, problem)
