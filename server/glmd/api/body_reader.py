"""JSON bodies to validated requests; large ones in a child process.

Parsing and validation hold the GIL, in a thread too: 32 MiB of text stop the event loop, and with
it all streams, for 0.2 s. Taking over the result costs a tenth of that, because `MAX_PARTS` and
`MAX_COMMAS` bound its values, and texts are copied (benchmarks/hostile_bodies.py). The memory that
parsing takes, and what the allocator keeps of it, is in a process that can be replaced.

The parent sends the class of the request, then the body. The child replies with the request or an
`ErrorInfo`, pickled.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pydantic_core
from pydantic import BaseModel, ValidationError

from glmd.api.errors import ErrorInfo, overloaded, validation_error
from glmd.utils.worker import Worker, WorkerError

log = logging.getLogger("glmd.api")

Model = TypeVar("Model", bound=BaseModel)

MAX_PARTS = 250_000
"""Strings, arrays and objects in a body. 10,000 messages with ten fields each have 210,000."""

MAX_COMMAS = 1_000_000
"""Commas between values of a body. Token ids of a full context have 200,000."""

MAX_SECONDS = 10.0
"""CPU time for one body. The slowest of 32 MiB takes 1 s."""

MAX_IDLE_BYTES = 256 << 20
"""Memory above which the process is replaced after a body. It starts with 80 MiB."""

PART_BYTES = 100
"""Memory of a string, array or object, besides its text: of an empty object with its place in an
array 72, of a key and its place 110."""

COMMA_BYTES = 40
"""Memory of a number and its place in an array."""

COUNT_BLOCK = 1 << 20

SURROGATE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})"  # a lone surrogate
    rb"|.)",
    re.DOTALL,
)
"""An escape within a JSON string; a lone surrogate is the group."""


def parse_json(body: bytes) -> Any:
    """Parse JSON without NaN and Infinity, nested at most 200 levels deep.

    A lone surrogate becomes U+FFFD: agents cut the output of tools inside surrogate pairs, and send
    the result with every later request of the conversation.

    Raises:
        ValueError: `body` is not JSON.
    """
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError:
        replaced = SURROGATE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], body)
        if replaced == body:
            raise
        return pydantic_core.from_json(replaced, allow_inf_nan=False)


def read_large_body(body: bytes, model: type[Model]) -> tuple[Model | ErrorInfo, int]:
    """Parse and validate a body with a bounded number of values.

    Returns: the request or the error, and about the bytes of the request's memory.
    """
    parts, commas = count_values(body)
    size = len(body) + PART_BYTES * parts + COMMA_BYTES * commas
    return _read_counted(body, model, parts, commas), size


def _read_counted(body: bytes, model: type[Model], parts: int, commas: int) -> Model | ErrorInfo:
    if parts > MAX_PARTS:
        message = f"The body has more than {MAX_PARTS:,} strings, arrays and objects."
        return ErrorInfo(413, "invalid_request_error", message)
    if commas > MAX_COMMAS:
        message = f"The body has more than {MAX_COMMAS:,} values."
        return ErrorInfo(413, "invalid_request_error", message)
    if sum(map(body.count, (b"[", b"{"))) > 4 * MAX_PARTS or body.count(b",") > 4 * MAX_COMMAS:
        message = "The texts of the body have too many brackets and commas, which may be JSON."
        return ErrorInfo(413, "invalid_request_error", message)
    try:
        value = parse_json(body)
    except ValueError as error:
        return ErrorInfo(400, "invalid_request_error", f"The body is not valid JSON: {error}.")
    try:
        return model.model_validate(value, from_attributes=True)  # as FastAPI does
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        return validation_error([{**each, "loc": ("body", *each["loc"])} for each in errors], value)


def count_values(body: bytes) -> tuple[int, int]:
    """Count strings, arrays, objects and commas between values, without parsing."""
    parts = commas = 0
    rest, in_string = b"", np.uint8(0)
    for start in range(0, len(body), COUNT_BLOCK):
        block = (rest + body[start : start + COUNT_BLOCK]).replace(rb"\\", b"")
        rest = b"\\" if block.endswith(b"\\") else b""  # half an escape
        block = block.removesuffix(rest).replace(rb"\"", b"")
        characters = np.frombuffer(block, np.uint8)
        quotes = characters == ord('"')
        # The number of quotes so far, modulo 256, is odd within strings.
        inside = (np.cumsum(quotes, dtype=np.uint8) + in_string) & 1
        if len(inside):
            in_string = inside[-1]
        opening = quotes & (inside == 1)
        outside = characters[inside == 0]
        parts += int(np.count_nonzero(opening))
        parts += int(np.count_nonzero((outside == ord("[")) | (outside == ord("{"))))
        commas += int(np.count_nonzero(outside == ord(",")))
    return parts, commas


class BodyReader:
    """Reads large bodies in a child process, one at a time."""

    def __init__(self) -> None:
        # The thread waits for the process and unpickles its replies.
        self._thread = ThreadPoolExecutor(1, "bodies")
        self.worker = Worker(f"{__name__}:make_answer", seconds=MAX_SECONDS, parts=2)

    async def read(self, body: bytes, model: type[Model]) -> tuple[Model | ErrorInfo, int]:
        """Parse and validate a body as `read_large_body` does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read, body, model)

    def close(self) -> None:
        """Kill the process."""
        self.worker.close()
        self._thread.shutdown()

    def _read(self, body: bytes, model: type[Model]) -> tuple[Model | ErrorInfo, int]:
        try:
            answer = self.worker.ask(f"{model.__module__}:{model.__qualname__}".encode(), body)
        except WorkerError as error:
            if error.reason == "time":
                message = f"The body takes more than {MAX_SECONDS:g} s to read."
                return ErrorInfo(413, "invalid_request_error", message), 0
            return overloaded("The body could not be read. Try again later."), 0
        reply: tuple[Model | ErrorInfo, int] = pickle.loads(answer)  # noqa: S301  (by this module)
        self.worker.replace_above(MAX_IDLE_BYTES)
        return reply


# -- in the child -------------------------------------------------------------------------


def make_answer() -> Callable[[bytes, bytes], bytes]:
    """Make the child's answer to the class of a request and a body."""
    gc.disable()  # Collections look at the growing result several times; it has no cycles.

    def answer(name: bytes, body: bytes) -> bytes:
        module, _, qualname = name.decode().partition(":")
        model = getattr(importlib.import_module(module), qualname)
        return pickle.dumps(read_large_body(body, model), pickle.HIGHEST_PROTOCOL)

    return answer
