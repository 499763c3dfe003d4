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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from glmd.chat.template import ChatTemplate, template_variables
from glmd.chat.tokenizer import Piece
from glmd.checkpoint.chat_template import read_template
from glmd.errors import CheckpointError, InvalidRequest, Overloaded, invalid_field
from glmd.utils.worker import Worker, WorkerError

log = logging.getLogger(__name__)

MAX_SECONDS = 5.0
"""CPU time for one conversation. 1,000 messages of 1,000 characters take GLM's template 0.02 s."""

MAX_BYTES = 512 * 2**20
"""Memory of the process, besides `BYTES_PER_BYTE`. The process starts with 25 MiB."""

BYTES_PER_BYTE = 20
"""Memory for each byte of a conversation, which is held as JSON, as objects, and rendered."""

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
        setup = {"source": source, "controls": dict(controls), "file": file}
        self._worker = Worker(
            f"{__name__}:make_answer", seconds=max_seconds, setup=pickle.dumps(setup)
        )
        self._max_seconds = max_seconds
        self._max_bytes = max_bytes
        try:
            reply = _decode_reply(self._worker.start())
        except WorkerError as error:
            problem = f"the chat template {self._problem(error)} when it is loaded"
            raise CheckpointError(f"{file}: not usable: {problem}.", file=file) from error
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
            Overloaded: its processes were killed or stopped from outside.
        """
        kwargs = kwargs or {}
        # The child reports only the text of an error, not its field.
        template_variables(kwargs, self.defaults)
        try:
            data = pickle.dumps({"messages": messages, "tools": tools, "kwargs": kwargs})
        except RecursionError as error:
            raise invalid_field("messages", f"cannot be given to the template: {error}") from error
        limit = self._max_bytes + BYTES_PER_BYTE * len(data)
        try:
            reply = _decode_reply(self._worker.ask(data, max_bytes=limit))
        except WorkerError as error:
            log.warning("Chat template killed: reason=%s, bytes=%d", error.reason, len(data))
            if error.reason == "gone":
                raise Overloaded("The prompt could not be rendered. Try again later.") from error
            problem = f"the chat template {self._problem(error)} on this conversation."
            raise invalid_field("messages", problem) from error
        if reply.error is not None:
            raise InvalidRequest(reply.error, param="messages")
        return [
            piece if isinstance(piece, int) else piece.decode("utf-8", "surrogatepass")
            for piece in reply.pieces
        ]

    def close(self) -> None:
        """Kill the process, also while another thread renders."""
        self._worker.close()

    def _problem(self, error: WorkerError) -> str:
        match error.reason:
            case "time":
                return f"takes more than {self._max_seconds:g} s"
            case "memory":
                return "needs too much memory"
            case _:
                return "crashes"


# -- in the child -------------------------------------------------------------------------


def make_answer() -> Callable[[bytes], bytes]:
    """Make the child's answers: first to the setup, then to conversations."""
    template: ChatTemplate | None = None

    def answer(data: bytes) -> bytes:
        nonlocal template
        request = pickle.loads(data)  # noqa: S301  (from the parent)
        try:
            if template is None:
                template = ChatTemplate(**request)
                return encode(
                    Reply(defaults=dict(template.defaults), ignored=list(template.ignored))
                )
            pieces = template.render(**request)
        except (CheckpointError, InvalidRequest) as error:
            return encode(Reply(error.message[:MAX_ERROR_CHARS]))
        encoded = [
            piece if isinstance(piece, int) else piece.encode("utf-8", "surrogatepass")
            for piece in pieces
        ]
        return encode(Reply(pieces=encoded))

    encode = msgspec.msgpack.encode
    return answer
