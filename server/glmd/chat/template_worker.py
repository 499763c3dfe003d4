"""A process that renders one chat template: the other side of `glmd.chat.template_process`.

It reads and writes JSON, each message behind its length, on the socket whose number it is given.
It leaves when the other side does.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from glmd.chat.template import ChatTemplate
from glmd.errors import CheckpointError, InvalidRequest

HEADER = 8

MAX_MESSAGE = 1000
"""Characters of an error: a template may say what it likes."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Let this process be ended when the block takes more of the processor's time.

    By the system, through SIGPROF, whose default that is: a handler in Python would wait for the
    end of the operation that does not end.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def set_up(setup: Mapping[str, Any]) -> ChatTemplate:
    return ChatTemplate(setup["source"], setup["controls"], file=setup["file"])


def render(template: ChatTemplate, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        rendered = template.render(
            request["messages"],
            tools=request["tools"],
            add_generation_prompt=request["add_generation_prompt"],
            kwargs=request["kwargs"],
        )
    except InvalidRequest as error:
        return {"error": error.message[:MAX_MESSAGE]}
    return {"pieces": rendered.pieces}


def serve(connection: socket.socket) -> None:
    """Answer the setup with nothing, or with what is wrong, and then every request."""
    stream = connection.makefile("rwb")

    def receive() -> Any:
        header = stream.read(HEADER)
        if len(header) < HEADER:
            sys.exit(0)
        return json.loads(stream.read(int.from_bytes(header, "little")))

    def send(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        stream.write(len(data).to_bytes(HEADER, "little") + data)
        stream.flush()

    setup = receive()
    try:
        with within(setup["seconds"]):
            template = set_up(setup)
    except CheckpointError as error:
        send({"error": error.message[:MAX_MESSAGE]})
        return
    send({})
    while True:
        request = receive()
        with within(setup["seconds"]):
            answer = render(template, request)
            send(answer)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
