"""Child process that answers messages one at a time, within limits.

For code that processes untrusted input and cannot be stopped in a thread: a template that loops,
a grammar that takes minutes. The limit is CPU time, because a busy or sleeping machine makes any
request slow. A process that died, or that uses no CPU time although it should answer (stopped,
waiting for a lost disk), is replaced, and the message is given to the next one.

Parent and child import this module. Messages are bytes, each behind its length.
"""

from __future__ import annotations

import logging
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Literal

import psutil

from glmd.utils.memory import process_memory_bytes

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Processes that a message is given to before it is refused."""

CRASHES_TO_BLAME = 2
"""Processes that failed on a message before the message is at fault."""

POLL_SECONDS = 0.05
"""Interval of checks. A process writes at most 10 GB/s: 0.5 GB in one interval."""

QUIET_POLLS = 100
"""Checks in a row, 5 s, without any CPU time, after which a process is replaced. Counted, so that
time in which this process does not run either does not matter."""

CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE})
"""Signals of a process that fails by itself. Another signal came from outside."""

END_SECONDS = 5.0
"""Time in which a process that has closed its socket ends by itself and says why."""

LENGTH = struct.Struct("!Q")


class WorkerError(Exception):
    """A message has no answer.

    Attributes:
        reason: `time`, `memory`: the message exceeds a limit. `crash`: processes failed on it.
            `gone`: processes were killed or stopped from outside, or did not start, which says
            nothing about the message.
    """

    def __init__(self, reason: Literal["time", "memory", "crash", "gone"]) -> None:
        super().__init__(reason)
        self.reason = reason


class StoppedError(OSError):
    """A process uses no CPU time."""


class Worker:
    """A child process, started with the first message and replaced when it ends.

    One thread at a time may call its methods, except for `close`.

    Args:
        answer: `module:function`; the function returns what answers messages in the child.
        seconds: CPU time for one message.
        parts: byte strings of a message.
        setup: message that each new process is given first. None: none.
    """

    def __init__(
        self, answer: str, *, seconds: float, parts: int = 1, setup: bytes | None = None
    ) -> None:
        module, _, function = answer.partition(":")
        self._program = (
            f"from {module} import {function}; from {__name__} import run;"
            f" run({function}(), {seconds!r}, {parts})"
        )
        self._name = module
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket
        self._busy = threading.Lock()
        self._closed = False
        self._cpu_seconds = 0.0
        self._quiet_polls = 0

    @property
    def pid(self) -> int | None:
        """Process id. None: no process runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> bytes:
        """Start the process; return its answer to the setup.

        Raises:
            WorkerError: as `ask`.
        """
        assert self._setup is not None
        with self._busy:
            return self._attempt((), inf)

    def ask(self, *parts: bytes, max_bytes: float = inf) -> bytes:
        """Send a message, and wait for the answer.

        Args:
            max_bytes: memory of the process, and size of the answer.

        Raises:
            WorkerError: there is no answer.
        """
        with self._busy:
            return self._attempt(parts, max_bytes)

    def replace_above(self, max_bytes: int) -> None:
        """Stop the process if it keeps more memory. The next message starts another."""
        with self._busy:
            try:
                if self._process and process_memory_bytes(self._process.pid) > max_bytes:
                    self._stop()
            except psutil.Error:
                self._stop()

    def close(self) -> None:
        """Kill the process, also while another thread waits for its answer."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._busy:
            self._stop()

    def _attempt(self, parts: tuple[bytes, ...], max_bytes: float) -> bytes:
        crashes = 0
        for _ in range(ATTEMPTS):
            if self._closed:
                break
            try:
                answer = self._ensure_started(max_bytes)
                return self._exchange(parts, max_bytes) if parts else answer
            except WorkerError:
                self._stop()
                raise
            except (OSError, EOFError, psutil.Error) as error:
                code = self._stop(0.0 if isinstance(error, StoppedError) else END_SECONDS)
                if code == -signal.SIGPROF:
                    raise WorkerError("time") from error
                if not self._closed:
                    log.warning("%s: process ended: code=%s error=%r", self._name, code, error)
                crashes += code is not None and (code > 0 or -code in CRASHES)
                if crashes == CRASHES_TO_BLAME:
                    raise WorkerError("crash") from error
        raise WorkerError("gone")

    def _ensure_started(self, max_bytes: float) -> bytes:
        if self._process is not None:
            return b""
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(POLL_SECONDS)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-c", self._program, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in a terminal is for the server alone
            )
        return b"" if self._setup is None else self._exchange((self._setup,), max_bytes)

    def _exchange(self, parts: tuple[bytes, ...], max_bytes: float) -> bytes:
        assert self._process is not None
        self._cpu_seconds, self._quiet_polls = -1.0, 0
        check = partial(self._check, psutil.Process(self._process.pid), max_bytes)
        for part in parts:
            _move(self._socket.send, LENGTH.pack(len(part)), check)
            _move(self._socket.send, part, check)
        head = bytearray(LENGTH.size)
        _move(self._socket.recv_into, head, check)
        (size,) = LENGTH.unpack(head)
        if size > max_bytes:
            raise WorkerError("memory")
        answer = bytearray(size)
        _move(self._socket.recv_into, answer, check)
        return bytes(answer)

    def _check(self, usage: psutil.Process, max_bytes: float) -> None:
        """Check a process that did nothing for `POLL_SECONDS` that this process sees.

        Raises:
            EOFError: this worker is closed.
            StoppedError: the process does not run.
            WorkerError: the process uses more memory than it may.
        """
        if self._closed:
            raise EOFError
        if max_bytes < inf and process_memory_bytes(usage.pid) > max_bytes:
            raise WorkerError("memory")
        times = usage.cpu_times()
        seconds = times.user + times.system
        self._quiet_polls = self._quiet_polls + 1 if seconds == self._cpu_seconds else 0
        self._cpu_seconds = seconds
        if self._quiet_polls > QUIET_POLLS:
            raise StoppedError("it does not run")

    def _stop(self, timeout: float = 0.0) -> int | None:
        """Kill the process unless it ends within `timeout` seconds.

        Returns: its exit code. None: it was killed here, or there is none.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        self._socket.close()
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def _move(
    step: Callable[[memoryview], int], data: bytes | bytearray, check: Callable[[], None]
) -> None:
    """Send or fill all of `data` in steps; `check` each time that a step times out.

    Raises:
        EOFError: the other side has closed the connection.
    """
    rest = memoryview(data)
    while rest:
        try:
            moved = step(rest)
        except TimeoutError:
            check()
            continue
        if not moved:
            raise EOFError
        rest = rest[moved:]


# -- in the child -------------------------------------------------------------------------


def run(answer: Callable[..., bytes], seconds: float, parts: int) -> None:
    """Answer messages until the parent ends.

    SIGPROF kills the process when it exceeds its CPU time. The signal keeps its default action: a
    handler in Python would run only after the operation that does not end.
    """
    with socket.socket(fileno=int(sys.argv[1])) as channel, channel.makefile("rb") as stream:
        while True:
            signal.setitimer(signal.ITIMER_PROF, 0)
            message: list[bytes] = []
            while len(message) < parts:
                head = stream.read(LENGTH.size)
                if len(head) < LENGTH.size:
                    return
                (size,) = LENGTH.unpack(head)
                message.append(stream.read(size))
                if len(message[-1]) < size:
                    return
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = answer(*message)
            message.clear()
            channel.sendall(LENGTH.pack(len(reply)))
            channel.sendall(reply)
            del reply
