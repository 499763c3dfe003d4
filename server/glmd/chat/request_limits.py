"""How much of anything one request may hold, beside its bytes (the setting `max_body`).

Each is far beyond what clients send, and near enough that what it bounds stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized

from glmd.errors import InvalidRequest

MAX_MESSAGES = 10_000
"""Messages, or items, of a conversation. Each takes two tokens at least, most take hundreds."""

MAX_TOOLS = 1000
"""An agent with a dozen MCP servers has 200."""

MAX_NAME = 256
"""Characters of the name of a model or a profile."""

MAX_STOP_LENGTH = 1000
"""Characters of a stop string."""

MAX_STOP_TOKENS = 1000

MAX_BIASED_TOKENS = 4096

MAX_PATTERN = 10_000
"""Characters of a regular expression. Grammars and schemas are bounded in bytes, and all of them in
the time that they take to compile (`glmd.structured_output.compiler`)."""

MAX_DEPTH = 100
"""Of schemas inside schemas; the deepest seen in the wild are near 15."""


def check_count(things: Sized | None, most: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: there are more than `most` things.
    """
    if things is not None and len(things) > most:
        raise InvalidRequest(
            f"{param} holds {len(things)} entries, more than the {most} that are taken.",
            param=param,
        )


def check_length(text: str | None, most: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: a text has more than `most` characters.
    """
    if text is not None and len(text) > most:
        raise InvalidRequest(
            f"{param} has {len(text)} characters, more than the {most} that are taken.",
            param=param,
        )


def check_depth(value: object, param: str, most: int = 4 * MAX_DEPTH) -> None:
    """
    Args:
        most: lists and objects inside each other. A schema inside a schema takes up to three.

    Raises:
        InvalidRequest: a JSON value is nested more deeply.
    """
    level = [value]
    for _ in range(most):
        below: list[object] = []
        for each in level:
            if isinstance(each, Mapping):
                below += each.values()
            elif isinstance(each, list):
                below += each
        if not below:
            return
        level = below
    raise InvalidRequest(f"{param} is nested too deeply.", param=param)
