"""The chat template in a child process, with limits on CPU time and memory.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files and from
Python's internals, but not from an endless loop or a string of any size, and a thread that runs one
cannot be stopped. A process can be killed. A prompt of 30,000 tokens takes 0.5 to 3 ms longer than in
the calling process
(`benchmarks/prompt_path.py`).

The child runs this module. Both sides send JSON, each message after its length, over a socket pair.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from glmd.chat.special_tokens import Piece
from glmd.chat.template import ChatTemplate, read_template, template_variables
from glmd.errors import CheckpointError, InvalidRequest, invalid_field
from glmd.utils.memory import process_memory_bytes

log = logging.getLogger(__name__)

MAX_SECONDS = 5.0
"""CPU time for one conversation. 1,000 messages of 1,000 characters take GLM's template 0.02 s."""

MAX_BYTES = 512 * 2**20
"""Memory of the process, besides `BYTES_PER_BYTE`. The process starts with 25 MiB."""

BYTES_PER_BYTE = 20
"""Memory for each byte of a conversation, which is held as JSON, as objects, and rendered."""

POLL_SECONDS = 0.05
"""Interval of memory checks. A process writes at most 10 GB/s: 0.5 GB in one interval."""

IDLE_SECONDS = 60.0
"""Time after which a process that neither replies nor uses CPU time is killed."""

HEADER_BYTES = 8
"""Size of a message's length, little-endian."""

MAX_ERROR_CHARS = 1000
"""A template chooses the text of its errors."""


class TemplateProcess:
    """A `ChatTemplate` in a child process, which is restarted after it was killed.

    Not thread-safe.
    """

    def __init__(
        self,
        source: str,
        controls: Mapping[str, int],
        *,
        file: str = "chat_template.jinja",
        max_seconds: float = MAX_SECONDS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """
        Args:
            source, controls, file: as for `ChatTemplate`.

        Raises:
            CheckpointError: as for `ChatTemplate`, or the template exceeds a limit.
        """
        self._setup = json.dumps(
            {"source": source, "controls": dict(controls), "file": file, "seconds": max_seconds}
        ).encode()
        self._max_seconds = max_seconds
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        try:
            reply = self._start()
        except InvalidRequest as error:
            problem = error.message.removeprefix("messages: ")
            raise CheckpointError(f"{file}: not usable: {problem}", file=file) from error
        if "error" in reply:
            self.close()
            raise CheckpointError(reply["error"], file=file)

    @classmethod
    def load(cls, folder: Path, controls: Mapping[str, int]) -> TemplateProcess:
        """Load a checkpoint's template (`read_template`).

        Raises:
            CheckpointError: no template, or as for the constructor.
        """
        source, file = read_template(folder)
        return cls(source, controls, file=str(file))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Piece]:
        """Render messages as `ChatTemplate.render` does.

        Raises:
            InvalidRequest: the template cannot render the conversation, or exceeds a limit.
        """
        kwargs = kwargs or {}
        template_variables(kwargs)  # the child reports only the text of an error, not its field
        try:
            # Escaped ASCII, because UTF-8 has no form for lone surrogates.
            data = json.dumps({"messages": messages, "tools": tools, "kwargs": kwargs}).encode()
        except (ValueError, RecursionError) as error:
            raise invalid_field("messages", f"cannot be given to the template: {error}") from error
        if self._process is None:
            self._start()
        reply = self._exchange(data)
        if "error" in reply:
            raise InvalidRequest(reply["error"], param="messages")
        pieces: list[Piece] = reply["pieces"]
        return pieces

    def close(self) -> None:
        """Kill the process."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> dict[str, Any]:
        """Start the process; returns its reply to the setup."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (this module)
                [sys.executable, "-P", "-m", "glmd.chat.template_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in a terminal is for the server alone
            )
        return self._exchange(self._setup)

    def _exchange(self, data: bytes) -> dict[str, Any]:
        """Send a message and wait for the reply.

        Raises:
            InvalidRequest: a limit was exceeded. The process has ended.
        """
        assert self._socket is not None
        assert self._process is not None
        limit = self._max_bytes + BYTES_PER_BYTE * len(data)
        try:
            self._socket.settimeout(IDLE_SECONDS)
            self._socket.sendall(len(data).to_bytes(HEADER_BYTES, "little") + data)
            length = int.from_bytes(self._receive(HEADER_BYTES, limit), "little")
            if length > limit:
                raise MemoryError
            reply: dict[str, Any] = json.loads(self._receive(length, limit))
        except MemoryError:
            problem = "needs too much memory"
        except TimeoutError:
            problem = f"does not respond within {IDLE_SECONDS:g} s"
        except OSError:  # the process has ended
            timed_out = self._process.wait() == -signal.SIGPROF
            problem = f"takes more than {self._max_seconds:g} s" if timed_out else "crashes"
        else:
            return reply
        self.close()
        log.warning("Chat template killed: problem=%r, request_bytes=%d", problem, len(data))
        raise invalid_field("messages", f"the chat template {problem} on this conversation.")

    def _receive(self, length: int, limit: int) -> bytearray:
        """Receive `length` bytes, while the process has at most `limit` bytes of memory."""
        assert self._socket is not None
        assert self._process is not None
        self._socket.settimeout(POLL_SECONDS)
        deadline = time.monotonic() + IDLE_SECONDS
        received = bytearray()
        while len(received) < length:
            try:
                piece = self._socket.recv(min(length - len(received), 2**20))
            except TimeoutError:
                if memory_bytes(self._process.pid) > limit:
                    raise MemoryError from None
                if time.monotonic() > deadline:
                    raise
                continue
            if not piece:
                raise ConnectionResetError
            received += piece
        return received


def memory_bytes(pid: int) -> int:
    """Memory of a process; 0 once it has ended."""
    try:
        return process_memory_bytes(pid)
    except psutil.NoSuchProcess:
        return 0


def serve(connection: socket.socket) -> None:
    """Child process: reply to the setup, then to each conversation, until the parent ends.

    SIGPROF kills the process when it exceeds its CPU time. The signal keeps its default action: a
    handler in Python would run only after the operation that does not end.
    """
    stream = connection.makefile("rwb")

    def receive() -> Any:
        header = stream.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            sys.exit(0)
        return json.loads(stream.read(int.from_bytes(header, "little")))

    def send(reply: Mapping[str, Any]) -> None:
        data = json.dumps(reply).encode()
        stream.write(len(data).to_bytes(HEADER_BYTES, "little") + data)
        stream.flush()

    setup = receive()
    signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
    try:
        template = ChatTemplate(setup["source"], setup["controls"], file=setup["file"])
    except CheckpointError as error:
        send({"error": error.message[:MAX_ERROR_CHARS]})
        return
    send({})
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        request = receive()
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            send({"pieces": template.render(**request)})
        except InvalidRequest as error:
            send({"error": error.message[:MAX_ERROR_CHARS]})


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
