"""The chat template in a child process, with limits on CPU time and memory.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files and from
Python's internals, but not from an endless loop or a string of any size, and a thread that runs one
cannot be stopped. A process can be killed. It adds 0.5 to 3 ms to a prompt of 30,000 tokens
(`benchmarks/prompt_path.py`).

Parent and child run this module. The child gets pickles, which take a tenth of JSON's time with the
GIL held, and replies in MessagePack: it runs the template, so its replies are not trusted.
"""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import psutil

from glmd.chat.template import ChatTemplate, template_variables
from glmd.chat.tokenizer import Piece
from glmd.checkpoint.chat_template import read_template
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

MAX_ERROR_CHARS = 1000
"""Limit of an error's text, which the template chooses."""


class Reply(msgspec.Struct):
    """A reply of the child process.

    Attributes:
        error: problem with the template or the conversation.
        pieces: `Piece`s; text in UTF-8, with surrogates.
        defaults, ignored: as of `ChatTemplate`, in the reply to the setup.
    """

    error: str | None = None
    pieces: list[int | bytes] = []
    defaults: dict[str, bool] = {}
    ignored: list[str] = []


_decode_reply = msgspec.msgpack.Decoder(Reply).decode


class TemplateProcess:
    """A `ChatTemplate` in a child process, which is restarted after it was killed.

    Not thread-safe.

    Attributes:
        defaults: as of `ChatTemplate`.
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
        self._setup = pickle.dumps(
            {"source": source, "controls": dict(controls), "file": file, "seconds": max_seconds}
        )
        self._max_seconds = max_seconds
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        try:
            reply = self._start()
        except InvalidRequest as error:
            problem = error.message.removeprefix("messages: ")
            raise CheckpointError(f"{file}: not usable: {problem}", file=file) from error
        if reply.error is not None:
            self.close()
            raise CheckpointError(reply.error, file=file)
        self.defaults: Mapping[str, bool] = reply.defaults
        for name in reply.ignored:
            log.warning(
                "%s: the template ignores %s. Requests that set it get no other prompt.", file, name
            )

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
        # The child reports only the text of an error, not its field.
        template_variables(kwargs, self.defaults)
        try:
            data = pickle.dumps({"messages": messages, "tools": tools, "kwargs": kwargs})
        except RecursionError as error:
            raise invalid_field("messages", f"cannot be given to the template: {error}") from error
        if self._process is None:
            self._start()
        reply = self._exchange(data)
        if reply.error is not None:
            raise InvalidRequest(reply.error, param="messages")
        return [
            piece if isinstance(piece, int) else piece.decode("utf-8", "surrogatepass")
            for piece in reply.pieces
        ]

    def close(self) -> int:
        """Kill the process. Returns its exit status (negative: a signal ended it), or 0."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
        if process is None:
            return 0
        process.kill()
        return process.wait()

    def _start(self) -> Reply:
        """Start the process, and return its reply to the setup."""
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (this module)
                [sys.executable, "-P", "-m", "glmd.chat.template_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in a terminal is for the server alone
            )
        return self._exchange(self._setup)

    def _exchange(self, data: bytes) -> Reply:
        """Send a message, and wait for the reply.

        Raises:
            InvalidRequest: a limit was exceeded. The process has ended.
        """
        assert self._connection is not None
        assert self._process is not None
        limit = self._max_bytes + BYTES_PER_BYTE * len(data)
        deadline = time.monotonic() + IDLE_SECONDS
        problem = "crashes"
        try:
            self._connection.send_bytes(data)
            while not self._connection.poll(POLL_SECONDS):
                if process_memory_bytes(self._process.pid) > limit:
                    problem = "needs too much memory"
                    break
                if time.monotonic() > deadline:
                    problem = f"does not respond within {IDLE_SECONDS:g} s"
                    break
            else:
                return _decode_reply(self._connection.recv_bytes(limit))
        except (OSError, EOFError, psutil.NoSuchProcess) as error:  # the process has ended
            log.debug("Chat template process ended: %r", error)
        if self.close() == -signal.SIGPROF:
            problem = f"takes more than {self._max_seconds:g} s"
        log.warning("Chat template killed: problem=%r, request_bytes=%d", problem, len(data))
        raise invalid_field("messages", f"the chat template {problem} on this conversation.")


def serve(connection: Connection) -> None:
    """Child process: reply to the setup, then to conversations until the parent ends.

    SIGPROF kills the process when it exceeds its CPU time. The signal keeps its default action: a
    handler in Python would run only after the operation that does not end.
    """

    def send(reply: Reply) -> None:
        connection.send_bytes(msgspec.msgpack.encode(reply))

    setup = pickle.loads(connection.recv_bytes())  # noqa: S301  (from the parent)
    signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
    try:
        template = ChatTemplate(setup["source"], setup["controls"], file=setup["file"])
    except CheckpointError as error:
        send(Reply(error.message[:MAX_ERROR_CHARS]))
        return
    send(Reply(defaults=dict(template.defaults), ignored=list(template.ignored)))
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            request = pickle.loads(connection.recv_bytes())  # noqa: S301
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            pieces = template.render(**request)
            encoded = [
                piece if isinstance(piece, int) else piece.encode("utf-8", "surrogatepass")
                for piece in pieces
            ]
            send(Reply(pieces=encoded))
        except InvalidRequest as error:
            send(Reply(error.message[:MAX_ERROR_CHARS]))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
