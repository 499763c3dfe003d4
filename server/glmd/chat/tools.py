"""The tools of a request: what the prompt tells of them, and what their arguments may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from glmd.chat.messages import Json
from glmd.chat.request_limits import MAX_TOOLS, check_count
from glmd.chat.tool_args import ArgType, ArgTypeReader, check_schema
from glmd.errors import InvalidRequest


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: dict[str, Json]
    """JSON schema of the arguments object; {} if the client gave none."""
    definition: dict[str, Json]
    """What the template prints: OpenAI's shape, `{"type": "function", "function": {…}}`."""
    strict: bool = False
    """Calls must follow the schema, and what of it cannot be enforced is to be refused."""
    param: str = "tools"
    """Where the client's request has the schema, for errors."""

    @cached_property
    def arguments(self) -> dict[str, ArgType]:
        """The types of the declared arguments, by name."""
        return ArgTypeReader(self.parameters).arguments()


def read_tools(raw: Sequence[Mapping[str, Any]] | None, param: str = "tools") -> list[Tool]:
    """Tools in OpenAI's chat shape, checked.

    The Responses and Anthropic APIs put their tools into this shape first.

    Raises:
        InvalidRequest: names the field at fault.
    """
    check_count(raw, MAX_TOOLS, param)
    tools: dict[str, Tool] = {}
    for index, one in enumerate(raw or ()):
        where = f"{param}[{index}]"
        tool = _read_tool(one, where)
        if tool.name in tools:
            name = f"{where}.function.name"
            raise InvalidRequest(f"{name}: there is a tool {tool.name!r} already.", param=name)
        tools[tool.name] = tool
    return list(tools.values())


def _read_tool(raw: object, param: str) -> Tool:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{param} must be an object.", param=param)
    if raw.get("type") not in (None, "function"):
        field = f"{param}.type"
        raise InvalidRequest(f'{field} must be "function".', param=field)
    function = raw.get("function")
    if not isinstance(function, Mapping):
        field = f"{param}.function"
        raise InvalidRequest(f"{field} must be an object.", param=field)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        field = f"{param}.function.name"
        raise InvalidRequest(f"{field} must be a non-empty string.", param=field)
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    field = f"{param}.function.parameters"
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{field} must be a JSON schema: an object.", param=field)
    check_schema(parameters, field)
    strict = is_strict(function, f"{param}.function")
    return Tool(name, parameters, {"type": "function", **raw}, strict, field)


def is_strict(function: Mapping[str, Any], param: str) -> bool:
    """What a function's `strict` says, which every API knows.

    Raises:
        InvalidRequest: neither true, false nor null.
    """
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        field = f"{param}.strict"
        raise InvalidRequest(f"{field} must be true or false.", param=field)
    return strict is True
