"""A server for one conversation: started, waited for, and ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from glmd.cli.daemon import ServerProcess
from glmd.errors import ServerRefused

POLL = 0.1
"""Seconds between two looks while it comes up."""

PATIENCE = 60.0
"""Seconds that it gets to end."""

ENDINGS = {signal.SIGTERM, signal.SIGHUP}
"""Signals by which we are told to leave."""

WAKE = signal.SIGUSR1
"""Wakes the thread that waits for them."""


@contextmanager
def own_server(
    arguments: list[str], key: str, progress: Callable[[dict[str, Any]], None] = lambda _: None
) -> Iterator[str]:
    """Have `glmd serve ARGUMENTS` run on a free port of this machine; gives its URL.

    Args:
        key: that it wants, beside those that it knows anyway.
        progress: called with what `/health` says while it loads.

    Raises:
        ServerRefused: it does not come up, with the end of its log.
    """
    command = [sys.executable, "-P", "-m", "glmd", "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryFile() as log:
        # In a group of its own: Ctrl-C stops an answer, not the server.
        environment = {**os.environ, "GLMD_API_KEY": key}
        server = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            env=environment,
        )
        previous = {number: signal.signal(number, leave) for number in ENDINGS}
        try:
            while (url := ready_at(server.pid, progress)) is None:
                if server.poll() is not None:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise ServerRefused(f"The server did not start: {' '.join(last)}")
                time.sleep(POLL)
            with told_to_leave(server):
                yield url
        finally:
            end(server)
            for number, handler in previous.items():
                signal.signal(number, handler)


def ready_at(pid: int, progress: Callable[[dict[str, Any]], None]) -> str | None:
    """The URL of a server that is ready; None: it is not, yet."""
    server = ServerProcess.find(pid)
    if server is None or server.health is None:
        return None
    progress(server.health)
    return server.url if server.health["status"] == "ready" else None


def end(server: subprocess.Popen[bytes]) -> None:
    """Have it drain and end; after `PATIENCE` it is killed."""
    server.terminate()
    try:
        server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def leave(number: int, _: object) -> None:
    """The server must not outlive us."""
    raise SystemExit(128 + number)


@contextmanager
def told_to_leave(server: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have a thread wait for the signals to leave, while the block may wait for a key.

    Python looks at signals, then readline waits for a key, and a signal that comes between the two
    would be noticed with the next key only.
    """
    terminal = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    over = threading.Event()

    def wait() -> None:
        while (number := signal.sigwait(ENDINGS | {WAKE})) == WAKE:
            if over.is_set():
                return
        end(server)
        if terminal is not None:  # readline may have it show no keys
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, terminal)
        os._exit(128 + number)

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS | {WAKE})
    waiting = threading.Thread(target=wait, name="told to leave", daemon=True)
    waiting.start()
    try:
        yield
    finally:
        over.set()
        assert waiting.ident is not None
        signal.pthread_kill(waiting.ident, WAKE)
        waiting.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
