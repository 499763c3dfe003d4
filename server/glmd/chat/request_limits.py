"""Limits of one request's parts, besides its size in bytes (setting `max_body`).

Each limit is far beyond what clients send, and low enough that the work it bounds stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized

from glmd.errors import invalid_field

MAX_MESSAGES = 10_000
"""Messages, or input items, of a conversation. Each takes at least two tokens."""

MAX_TOOLS = 1000
"""An agent with a dozen MCP servers has 200."""

MAX_NAME = 256
"""Characters of a model or profile name."""

MAX_STOP_LENGTH = 1000
"""Characters of a stop string."""

MAX_STOP_TOKENS = 1000

MAX_BIASED_TOKENS = 4096

MAX_PATTERN = 10_000
"""Characters of a regular expression. Grammars and schemas are limited in bytes and in compile time
(`glmd.structured_output.compiler`)."""

MAX_DEPTH = 100
"""Nesting of JSON schemas. The deepest seen in practice have about 15 levels."""


def check_count(values: Sized | None, limit: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: more than `limit` values.
    """
    if values is not None and len(values) > limit:
        raise invalid_field(param, f"{len(values)} entries exceed the limit of {limit}.")


def check_length(text: str | None, limit: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: more than `limit` characters.
    """
    if text is not None and len(text) > limit:
        raise invalid_field(param, f"{len(text)} characters exceed the limit of {limit}.")


def check_depth(value: object, param: str, limit: int = 4 * MAX_DEPTH) -> None:
    """
    Args:
        limit: levels of lists and objects. One level of a JSON schema takes up to three.

    Raises:
        InvalidRequest: a JSON value has more levels.
    """
    level = [value]
    for _ in range(limit):
        below: list[object] = []
        for each in level:
            if isinstance(each, Mapping):
                below += each.values()
            elif isinstance(each, list):
                below += each
        if not below:
            return
        level = below
    raise invalid_field(param, "nested too deeply.")
