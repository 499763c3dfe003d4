"""The chat template in a process of its own, with a bound on its time and its memory.

A template is a program that came with somebody else's checkpoint. Jinja's sandbox keeps it from
files and from Python's insides, but not from a loop without an end or a string without a limit,
and neither can be stopped from a thread beside it: a single operation may take all the time and
all the memory that there is. A process can be ended.
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

from glmd.chat.template import DEFAULTS, Rendered, read_template, template_variables
from glmd.errors import CheckpointError, InvalidRequest

log = logging.getLogger(__name__)

MAX_SECONDS = 5.0
"""Of the processor's time, for one conversation. 1,000 messages of 1,000 characters take GLM's
template 0.02 s."""

MAX_BYTES = 512 * 2**20
"""Of memory, beside what follows from the size of the conversation. It begins with 20 MiB."""

BYTES_PER_BYTE = 20
"""Memory for each byte of a conversation: it is there as JSON, as objects, and rendered."""

LOOK = 0.05
"""Seconds between looks at the process while it works: writing memory goes at 10 GB/s at most."""

PATIENCE = 60.0
"""Seconds after which a process that neither answers nor computes is given up."""

HEADER = 8
"""Bytes of a message's length, little-endian."""


class TemplateProcess:
    """A template's process: started at once, and again after it had to be ended. For one thread."""

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
            source: the template.
            controls: the tokenizer's control tokens, spelling to id.
            file: where it comes from, for errors.

        Raises:
            CheckpointError: it does not compile, is not in GLM's format, or exceeds its bounds.
        """
        self._spellings = {id: name for name, id in controls.items()}
        self._setup = json.dumps(
            {"source": source, "controls": dict(controls), "file": file, "seconds": max_seconds}
        ).encode()
        self._max_seconds = max_seconds
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        try:
            answer = self._ask(b"")
        except InvalidRequest as error:
            raise CheckpointError(f"{file} is no usable template: {error}", file=file) from error
        if "error" in answer:
            self.close()
            raise CheckpointError(answer["error"], file=file)

    @classmethod
    def load(cls, folder: Path, controls: Mapping[str, int]) -> TemplateProcess:
        """The template of a checkpoint.

        Raises:
            CheckpointError: there is none, or as the constructor says.
        """
        source, file = read_template(folder)
        return cls(source, controls, file=str(file))

    def variables(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """As of `ChatTemplate`."""
        return template_variables(kwargs, DEFAULTS)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Render messages in the template's own (OpenAI-like) shape.

        Raises:
            InvalidRequest: the template refuses the conversation, or takes too much for it.
        """
        kwargs = kwargs or {}
        self.variables(kwargs)
        request = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "kwargs": kwargs,
        }
        try:
            # All that is not ASCII is escaped: halves of surrogate pairs have no other form.
            data = json.dumps(request).encode()
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"The chat template cannot be given this conversation: {error}", param="messages"
            ) from error
        answer = self._ask(data)
        if "error" in answer:
            raise InvalidRequest(answer["error"], param="messages")
        pieces = answer["pieces"]
        text = "".join(self._spellings[each] if isinstance(each, int) else each for each in pieces)
        return Rendered(pieces, text)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
        if process is not None:
            process.kill()
            process.wait()

    def _ask(self, data: bytes) -> dict[str, Any]:
        """What the process says to a request; with an empty one, to its setup.

        Raises:
            InvalidRequest: it exceeds its bounds, or ends otherwise. Then the next call starts
                another one.
        """
        try:
            if self._process is None:
                self._start()
                answer = self._exchange(self._setup)
                if not data or "error" in answer:
                    return answer
            return self._exchange(data)
        except OverflowError:
            why = "more memory than it may"
        except TimeoutError:
            why = f"more than {self._max_seconds:g} s"
        except OSError:
            ended = self._process.wait() if self._process is not None else 0
            why = f"more than {self._max_seconds:g} s"
            if ended != -signal.SIGPROF:
                why = "more than its process can take"
        self.close()
        log.warning("The chat template took %s for a conversation of %d bytes.", why, len(data))
        raise InvalidRequest(
            f"The chat template takes {why} for this conversation.", param="messages"
        )

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (ourselves)
                [sys.executable, "-P", "-m", "glmd.chat.template_worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in a terminal is for the server alone
            )

    def _exchange(self, data: bytes) -> dict[str, Any]:
        """Send a message and wait for its answer, with an eye on the process.

        Raises:
            OverflowError: it holds too much memory.
            TimeoutError: it does nothing.
            OSError: it has ended.
        """
        assert self._socket is not None
        self._socket.settimeout(PATIENCE)
        self._socket.sendall(len(data).to_bytes(HEADER, "little") + data)
        limit = self._max_bytes + BYTES_PER_BYTE * len(data)
        length = int.from_bytes(self._receive(HEADER, limit), "little")
        if length > limit:
            raise OverflowError
        answer: dict[str, Any] = json.loads(self._receive(length, limit))
        return answer

    def _receive(self, length: int, limit: int) -> bytearray:
        assert self._socket is not None
        assert self._process is not None
        self._socket.settimeout(LOOK)
        deadline = time.monotonic() + PATIENCE
        received = bytearray()
        while len(received) < length:
            try:
                piece = self._socket.recv(min(length - len(received), 2**20))
            except TimeoutError:
                if resident(self._process.pid) > limit:
                    raise OverflowError from None
                if time.monotonic() > deadline:
                    raise
                continue
            if not piece:
                raise ConnectionResetError
            received += piece
        return received


def resident(pid: int) -> int:
    """Bytes that a process has in memory; 0 once it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
