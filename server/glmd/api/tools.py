"""Tools as the Responses and Messages APIs send them, which differ from chat's in their shape.

A tool that the server would have to run (a web search) is one that this server lacks. Beside
functions it is left out, as if nobody had offered it; offered alone it is refused, because then
the client asks for just that, and would take for a finding what the model makes up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glmd.chat.messages import is_strict
from glmd.chat.request_limits import MAX_TOOLS, check_count
from glmd.chat.tool_args import check_schema
from glmd.chat.types import Tool
from glmd.errors import InvalidRequest


def read_flat_tools(
    raw: Iterable[tuple[Mapping[str, Any], str]],
    *,
    schema_key: str,
    function_types: Sequence[str | None],
    is_hosted: Callable[[str], bool],
) -> tuple[list[Tool], list[str]]:
    """The functions among the tools, and names of the hosted tools that are left out.

    Args:
        raw: each tool, and where it stands in the request.
        schema_key: what holds a function's JSON schema.
        function_types: values of `type` that mean a function; None: its absence.
        is_hosted: whether a type means a tool that the server runs.

    Raises:
        InvalidRequest: a tool is malformed or of another type, or there are only hosted ones.
    """
    tools: dict[str, Tool] = {}
    left_out: list[str] = []
    for one, where in raw:
        type = one.get("type")
        if isinstance(type, str) and is_hosted(type):
            left_out.append(f"{where}.type={type}")
            continue
        if type not in function_types:
            raise InvalidRequest(
                f"{where}.type {type!r} is no tool that this model knows: describe it as a"
                f" function, with a name and {schema_key}.",
                param=f"{where}.type",
            )
        tool = _read_function(one, schema_key, where)
        if tool.name in tools:
            name = f"{where}.name"
            raise InvalidRequest(f"{name}: there is a tool {tool.name!r} already.", param=name)
        tools[tool.name] = tool
    if left_out and not tools:
        param, _, hosted = left_out[0].partition("=")
        raise InvalidRequest(f"{param}: this server runs no tools, such as {hosted}.", param=param)
    return list(tools.values()), left_out


def _read_function(raw: Mapping[str, Any], schema_key: str, param: str) -> Tool:
    name, description = raw.get("name"), raw.get("description")
    schema = raw.get(schema_key)
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequest(f"{param}.name must be a non-empty string.", param=f"{param}.name")
    if description is not None and not isinstance(description, str):
        field = f"{param}.description"
        raise InvalidRequest(f"{field} must be a string.", param=field)
    if schema is not None and not isinstance(schema, dict):
        field = f"{param}.{schema_key}"
        raise InvalidRequest(f"{field} must be a JSON schema: an object.", param=field)
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    if schema is not None:
        check_schema(schema, f"{param}.{schema_key}")
        function["parameters"] = schema
    definition: dict[str, Any] = {"type": "function", "function": function}
    return Tool(name, schema or {}, definition, is_strict(raw, param), f"{param}.{schema_key}")


def numbered(raw: Sequence[Mapping[str, Any]] | None) -> list[tuple[Mapping[str, Any], str]]:
    """Each tool with its place in the request's `tools`.

    Raises:
        InvalidRequest: there are too many.
    """
    check_count(raw, MAX_TOOLS, "tools")
    return [(tool, f"tools[{index}]") for index, tool in enumerate(raw or ())]
